"""The checkpoints of a run in the order in which they were saved.

Who goes back to step 2 and on from there leaves a branch with larger numbers behind, which is not the run's latest. So
each checkpoint says when it was saved (``checkpoint.folder_seal``); of another Trainer's, its file of progress does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dist_optim.checkpoint.folder_seal import MARK

__all__ = ["checkpoints_in", "remove_older"]

STATE = "trainer_state.json"


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the latest last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _step_of(path).isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: (_saved_at(path), int(_step_of(path))))


def remove_older(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest, so that the limit's number of them is left; the latest and the best stay in any case."""
    if not limit or limit < 0:
        return
    *older, latest = checkpoints_in(output_dir)
    removable = [path for path in older if best is None or path != Path(best)]
    kept = len(older) + 1 - len(removable)
    for path in removable[: max(0, len(removable) - max(0, limit - kept))]:
        shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def _saved_at(path: Path) -> int:
    try:
        return int(json.loads((path / MARK).read_text(encoding="utf-8"))["saved_at_ns"])
    except (OSError, ValueError, LookupError, TypeError):
        state = path / STATE
        return (state if state.exists() else path).stat().st_mtime_ns
