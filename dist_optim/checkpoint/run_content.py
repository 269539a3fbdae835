"""What ``save_checkpoint`` writes, taken at one moment and then written: at once, or beside the training."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_optim.checkpoint.blocks import Pieces, write_pieces
from dist_optim.checkpoint.directory import attempt, written_aside
from dist_optim.checkpoint.engine_view import EngineView
from dist_optim.checkpoint.identity import FORMAT, digest_of, new_word, write_record
from dist_optim.checkpoint.optimizer_content import RECORD as OPTIMIZER_RECORD
from dist_optim.checkpoint.optimizer_content import Content, write_optimizer
from dist_optim.checkpoint.rehearsal import rehearse_optimizer, rehearse_weights
from dist_optim.checkpoint.seals import seal
from dist_optim.errors import CheckpointError
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank

__all__ = ["OPTIMIZER", "RECORD", "SCHEDULE", "Run", "own_file_of", "plain_files", "write_run"]

RECORD, SCHEDULE = "checkpoint.json", "scheduler.pt"
OPTIMIZER = f"optimizer/{OPTIMIZER_RECORD}"


@dataclass(frozen=True, slots=True)
class Run:
    """What is written, as this rank has it; the live tensors, or copies of them."""

    weights: Callable[[], AbstractContextManager[Mapping[str, Pieces]]]
    """Those to export, for as long as they are in place."""
    optimizer: Callable[[], Content]
    files: Mapping[str, bytes]
    """Small ones that this rank writes, by name."""
    about: Mapping[str, Any]
    """What the record says of the moment."""


def write_run(directory: Path, run: Run, ranks: dist.ProcessGroup | None, rehearsal: EngineView | None = None) -> None:
    """Write it into a folder, which appears whole or not at all. Collective.

    Args:
        directory: The folder.
        run: This rank's part.
        ranks: All that train the model; no other group is used.
        rehearsal: What to compare with all that was written, read again; None for not.
    """
    with written_aside(directory, ranks) as aside:
        with run.weights() as pieces:
            write_pieces(aside / "model", pieces, ranks)
            if rehearsal is not None:
                rehearse_weights(aside / "model", pieces, rehearsal)
        word = new_word(ranks)
        attempt(lambda: (aside / "optimizer").mkdir() if own_rank(ranks) == 0 else None, directory, ranks)
        write_optimizer(aside / "optimizer", run.optimizer(), word, ranks)
        if rehearsal is not None:
            rehearse_optimizer(aside / "optimizer", rehearsal)
        parts = gather_objects(attempt(lambda: _write_files(aside, run.files, ranks), directory, ranks), ranks)
        record = {
            "format": FORMAT,
            "identity": word,
            **run.about,
            "world_size": num_ranks(ranks),
            "model": seal(aside / "model", ranks),
            "parts": {name: digest for one in parts for name, digest in one.items()},
        }
        attempt(lambda: write_record(aside / RECORD, record) if own_rank(ranks) == 0 else None, directory, ranks)


def _write_files(aside: Path, files: Mapping[str, bytes], ranks: dist.ProcessGroup | None) -> dict[str, str]:
    """Write this rank's small files; digests of them, and on the first rank of the optimizer's record."""
    (aside / "ranks").mkdir(exist_ok=True)
    for name, content in files.items():
        (aside / name).write_bytes(content)
    return {name: digest_of(aside / name) for name in [*files, *([] if own_rank(ranks) else [OPTIMIZER])]}


def own_file_of(rank: int) -> str:
    """The name of the file that holds what a rank gave as ``own``."""
    return f"ranks/{rank}.pt"


def plain_files(rank: int, scheduler: Any, own: Any) -> dict[str, bytes]:
    """This rank's own values, and on the first rank the schedule's, as files. Not a collective."""
    files = {own_file_of(rank): _plain_file(own_file_of(rank), own)}
    if rank == 0 and scheduler is not None:
        if not callable(getattr(scheduler, "state_dict", None)):
            raise CheckpointError(
                f"The schedule {type(scheduler).__name__} has no state_dict(). Pass a schedule that has one, or "
                "scheduler=None and what it needs in `own`."
            )
        files[SCHEDULE] = _plain_file(SCHEDULE, scheduler.state_dict())
    return files


def _plain_file(name: str, values: Any) -> bytes:
    """Save them, and prove that they load as plain values."""
    file = io.BytesIO()
    try:
        torch.save(values, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{Path(name).name} would hold more than numbers, strings, lists, dicts and tensors, and could not be "
            f"loaded safely ({type(error).__name__}). Give plain values, and a schedule whose state_dict() returns "
            "such."
        ) from error
    return file.getvalue()
