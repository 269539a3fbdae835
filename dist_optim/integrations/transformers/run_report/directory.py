"""One run's folder on disk, kept by rank 0: results appear in it together, or not at all.

Everything is written to ``OUTPUT_DIR/.unfinished``. Its ``summary.json``, written last, says that the results are
whole; then they are moved into place, the summary last again. A run that is interrupted leaves an earlier run in the
same folder as it was, and a kill between two moves costs nothing: the next start makes the others.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from dist_optim.errors import UsageError
from dist_optim.files import written_whole
from dist_optim.integrations.transformers.history import checkpoints_in
from dist_optim.integrations.transformers.run_report.measures import headline
from dist_optim.integrations.transformers.run_report.plots import plot_losses, plot_rates
from dist_optim.reporting.files import ABOUT, DECISIONS, METRICS, SUMMARY, UNFINISHED

__all__ = ["FINISHED_NAMES", "LAST", "RunDirectory", "find_checkpoint"]

LAST = "last"
FINISHED_NAMES = ("model", ABOUT, METRICS, "loss.png", "lr.png", SUMMARY)
OVERWRITING = "add --overwrite_output_dir (in Python: report.claim(output_dir, overwrite=True))"


def find_checkpoint(asked: str | None, output_dir: str) -> Path | None:
    """The checkpoint to resume from; ``last`` without any starts from the beginning, for jobs that restart themselves.

    Raises:
        UsageError: The folder does not exist, or is no checkpoint.
    """
    saved = checkpoints_in(output_dir)
    if asked is None or asked == LAST:
        return saved[-1] if asked and saved else None
    if not Path(asked).is_dir():
        listed = ", ".join(map(str, saved)) or f"the checkpoints of a run (there are none in {output_dir!r})"
        raise UsageError(f"--resume_from_checkpoint {asked!r} is not a folder. Give one of {listed}, or: {LAST}.")
    if not (Path(asked) / "trainer_state.json").is_file():
        raise UsageError(f"--resume_from_checkpoint {asked!r} was not saved by a Trainer: no trainer_state.json.")
    return Path(asked)


class RunDirectory:
    """``claim`` it, ``write_rows`` as they come, then ``finish``."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir)
        self.unfinished = self.path / UNFINISHED
        self._was_there = self.path.exists()
        self._stale: list[Path] = []

    def claim(self, overwrite: bool, resume: str | None) -> bool:
        """Make room for a run; False where this very run has finished and was only started again.

        Args:
            overwrite: Whether a run that the folder holds may be replaced.
            resume: A checkpoint to go on from, or ``last``; None for a run from its beginning.

        Raises:
            UsageError: The folder holds what would be replaced unasked, or cannot be written.
        """
        try:
            self._move_into_place()
            if not overwrite and resume == LAST and (self.path / SUMMARY).exists():
                return False
            if not overwrite:
                self._refuse_to_replace(resume)
            elif resume is None:
                self._stale = checkpoints_in(self.path)
            self.discard()
            self.unfinished.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"--output_dir {str(self.path)!r} cannot be written: {error}. Choose another folder."
            ) from error
        return True

    def _refuse_to_replace(self, resume: str | None) -> None:
        held = [name for name in FINISHED_NAMES if (self.path / name).exists()]
        if SUMMARY in held or (held and resume is None):
            raise UsageError(
                f"--output_dir {str(self.path)!r} already holds a run ({', '.join(held)}). Choose another folder, or "
                f"{OVERWRITING}, which replaces that run once the new one has finished."
            )
        saved = checkpoints_in(self.path)
        if saved and resume is None:
            raise UsageError(
                f"--output_dir {str(self.path)!r} holds checkpoints of a run ({saved[-1].name} is the last). Go on "
                f"from it with --resume_from_checkpoint {LAST}, choose another folder, or {OVERWRITING}."
            )

    def write_rows(self, rows: list[dict[str, Any]], mode: str = "a") -> None:
        """Add lines to the metrics, or with mode "w" begin them anew; they are on disk when this returns."""
        with open(self.unfinished / METRICS, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)

    def write_about(self, about: dict[str, Any]) -> None:
        """How the run was started; it is on disk, whole, when this returns."""
        self._write_whole(ABOUT, json.dumps(about, indent=2, default=str, skipkeys=True))

    def drop_stale_checkpoints(self, kept: str = "") -> None:
        """Remove the checkpoints of the run that this one replaces."""
        for path in self._stale:
            if path.name != kept:
                shutil.rmtree(path, ignore_errors=True)
        self._stale = []

    def finish(
        self, model: Any, weights: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]], summary: dict[str, Any]
    ) -> None:
        """Write the rest, and move everything into place."""
        for part, options in ((model, {"state_dict": weights}), (tokenizer, {})):
            if part is not None:
                part.save_pretrained(self.unfinished / "model", **options)
        plot_losses(rows, self.unfinished / "loss.png", headline(summary))
        plot_rates(rows, self.unfinished / DECISIONS, self.unfinished / "lr.png", headline(summary))
        self.drop_stale_checkpoints()
        self._write_whole(SUMMARY, json.dumps(_finite(summary), indent=2))
        self._move_into_place()

    def _write_whole(self, name: str, text: str) -> None:
        with written_whole(self.unfinished / name) as draft:
            draft.write_text(text + "\n", encoding="utf-8")

    def _move_into_place(self) -> None:
        """Move whole results, if there are any; what a kill leaves undone here, the next call does."""
        mark = self.unfinished / SUMMARY
        if not mark.exists():
            return
        (self.path / SUMMARY).unlink(missing_ok=True)
        if "lr_decisions" not in json.loads(mark.read_text(encoding="utf-8")):
            (self.path / DECISIONS).unlink(missing_ok=True)
        for name in (*(name for name in FINISHED_NAMES if name != SUMMARY), DECISIONS):
            new, old = self.unfinished / name, self.path / name
            if new.exists() and old.is_dir():
                old.rename(self.unfinished / f"old_{name}")
            if new.exists():
                new.replace(old)
        mark.replace(self.path / SUMMARY)
        self.discard()

    def discard(self) -> None:
        """Remove what is unfinished; whole results wait to be moved."""
        if self.unfinished.exists() and not (self.unfinished / SUMMARY).exists():
            shutil.rmtree(self.unfinished)

    def give_up(self) -> None:
        """Leave the disk as it was before ``claim``."""
        self.discard()
        if not self._was_there and self.path.is_dir() and not list(self.path.iterdir()):
            self.path.rmdir()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row as strict JSON can hold it: NaN and infinity become null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
