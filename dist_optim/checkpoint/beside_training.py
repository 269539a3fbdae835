"""Saves that are written while training goes on: a copy of this rank's own part, and a thread that writes it.

The thread runs the code that writes any save, so all that holds of one holds of the other: a folder appears whole or
not at all, and what fails on one rank fails on all. Only the telling of it waits, for the next call of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_optim.checkpoint.blocks import Pieces
from dist_optim.checkpoint.engine_view import EngineView
from dist_optim.errors import BackgroundSaveError, CheckpointError, DistOptimError
from dist_optim.ranks.agreement import assert_ranks_equal, num_ranks, own_rank
from dist_optim.ranks.background import in_background, wait_for_all, wait_together
from dist_optim.ranks.together import together

__all__ = ["begin", "own_copies", "wait_for_saves", "write_beside"]


def wait_for_saves() -> None:
    """Return when a save with ``asynchronous=True`` is on the disk. Collective on the ranks that have saved.

    Where there is none, it returns at once.

    Raises:
        BackgroundSaveError: On all ranks: it failed on one, and no call has raised that yet. What was saved in the
            same place before is untouched.
    """
    wait_for_all("wait_for_saves()")


def begin(call: str, view: EngineView, options: Mapping[str, Any] | None = None) -> None:
    """At the beginning of a save or a load: all ranks make it, alike, and no other one is under way. Collective.

    Raises:
        BackgroundSaveError: On all ranks: the last one has failed, and no call has raised that yet.
        RanksDisagreeError: Ranks have given different options.
    """
    view.meet(call)
    wait_together(view.ranks)
    if options:
        assert_ranks_equal(call, list(options.items()), "Give the same on every rank.", view.ranks)


def own_copies(pieces: Mapping[str, Pieces], directory: Path, ranks: dist.ProcessGroup | None) -> dict[str, Pieces]:
    """Copies on the host of what this rank is to write; what all ranks hold, one of them copies. Collective.

    Args:
        pieces: What this rank holds.
        directory: Where they are saved, for the message.
        ranks: All that train the model.

    Raises:
        CheckpointError: On all ranks: one has no room.
    """
    writers = _writers(pieces, num_ranks(ranks))
    assert_ranks_equal("Saving beside the training", list(writers.items()), "This should not be: report it.", ranks)
    own = own_rank(ranks)
    return together(
        lambda: {name: piece.copied() for name, piece in pieces.items() if writers.get(name, own) == own},
        ranks,
        doing=f"Copying what is to be saved in {str(directory)!r} to the host",
        remedy="Save with asynchronous=False, which copies nothing.",
        otherwise=CheckpointError,
    )


def _writers(pieces: Mapping[str, Pieces], num_ranks: int) -> dict[str, int]:
    """Of what all ranks hold, who writes it: about as many bytes each."""
    nbytes = {name: piece.shape.numel() * piece.dtype.itemsize for name, piece in pieces.items() if piece.is_everywhere}
    load, writers = [0] * num_ranks, {}
    for name in sorted(nbytes, key=lambda name: (-nbytes[name], name)):
        writers[name] = load.index(min(load))
        load[writers[name]] += nbytes[name]
    return writers


def write_beside(
    write: Callable[[dist.ProcessGroup | None], None], directory: Path, ranks: dist.ProcessGroup | None
) -> None:
    """Write in a thread, over a group of its own. Collective, after ``begin``; returns at once."""

    def failed(error: BaseException) -> BackgroundSaveError:
        text = str(error) if isinstance(error, DistOptimError) else f"{type(error).__name__}: {error}."
        told = BackgroundSaveError(
            f"Saving {str(directory)!r} beside the training (asynchronous=True) failed: {text} Weights and state are "
            "as they were before this call: mend that, save again, and go on; or load the last checkpoint."
        )
        told.__cause__ = error
        return told

    in_background(write, ranks, failed)
