"""A save that is loaded again at once: what would fail at the first resume, hours later, fails at this save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_optim.checkpoint.blocks import Pieces, read_pieces
from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.engine_view import EngineView
from dist_optim.checkpoint.optimizer_state import look_into, read_state
from dist_optim.errors import CheckpointError
from dist_optim.specs.same_bits import same
from dist_optim.stepping.fresh_state import instances_aside

__all__ = ["rehearse_optimizer", "rehearse_weights"]

REMEDY = (
    "Nothing was saved. The disk, or this class's state, does not keep what is written: try another folder; for a "
    "class of your own, register an OptimizerSpec whose driver stores what it keeps (docs/adding-an-optimizer.md)."
)


def rehearse_weights(folder: Path, held: Mapping[str, Pieces], view: EngineView) -> None:
    """Read weights that were just written, and compare. Collective; it takes room for this rank's part of them.

    Raises:
        CheckpointError: On all ranks: they are not what was written.
    """
    rooms = {name: piece.room(piece.dtype) for name, piece in held.items()}
    read_pieces(folder, rooms, view.ranks)

    def compare() -> None:
        for name, piece in held.items():
            if any(not same(block, rooms[name].blocks[offsets]) for offsets, block in piece.blocks.items()):
                raise CheckpointError(f"{name!r} reads otherwise than it was written. {REMEDY}")

    attempt(compare, folder, view.ranks)


def rehearse_optimizer(folder: Path, view: EngineView) -> None:
    """Load an optimizer's state that was just written into new instances of upstream, and compare. Collective.

    The optimizer stays as it is, and no random generator is touched. It takes twice this rank's state.

    Raises:
        CheckpointError: On all ranks: a part of it is missing, or is not what was written.
    """
    incoming = attempt(lambda: look_into(folder, view), folder, view.ranks)
    read_state(view, incoming)
    attempt(lambda: _compare(view, incoming.state), folder, view.ranks)


def _compare(view: EngineView, read: Mapping[str, Mapping[str, Any]]) -> None:
    for part in view.parts:
        second = {index: one for one in instances_aside(part.holdings) for index in one.shadows}
        for instance, index in part.holdings.stepped_here():
            name, own = part.holdings.placed[index].fqn, instance.encoded_state(index)
            second[index].write_encoded_state(index, read.get(name, {}))
            found = second[index].encoded_state(index)
            for key in own.keys() | found.keys():
                if not same(own.get(key), found.get(key)):
                    raise CheckpointError(f"{key!r} in the state of {name!r} loads otherwise than it was. {REMEDY}")
