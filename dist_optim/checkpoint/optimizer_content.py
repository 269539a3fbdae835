"""What is written of a ``DistributedOptimizer``, at one moment: tensors by logical name, and a record.

::

    <directory>/optimizer.json    optimizer, steps, mode, param groups, hyperparameters of the build, scalars of the
                                  state; what binds it to the tensors (see identity)
    <directory>/tensors/          "state/<fqn>/<key>"; "weights/<fqn>" where what is trained is not what the model
                                  holds: of optimizers that swap weights, and masters of half precision

Nothing in it tells how parameters were sharded or who owned what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.checkpoint.blocks import Pieces, write_pieces
from dist_optim.checkpoint.build_values import build_values
from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.engine_view import EngineView
from dist_optim.checkpoint.group_values import encoded
from dist_optim.checkpoint.identity import FORMAT, write_record
from dist_optim.checkpoint.schema import census
from dist_optim.checkpoint.seals import seal
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.registry import Trait
from dist_optim.stepping import rank_state
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.sharing import shared_extras
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.stepping.whole_state import is_slice, memory_order, shape_of_whole

__all__ = ["RECORD", "Content", "content_of", "name_of_weights", "stepped_here", "write_optimizer"]

RECORD = "optimizer.json"


@dataclass(frozen=True, slots=True)
class Content:
    """What is written of an optimizer, as this rank has it at one moment."""

    pieces: Mapping[str, Pieces]
    """Its tensors, by logical name."""
    scalars: Mapping[str, Mapping[str, Any]]
    """The rest of its state, by parameter."""
    memory_orders: Mapping[str, list[int]]
    """Of whole tensors that do not lie in the order of their dims."""
    structure: str
    """What upstream's extras look like; empty on a rank that has none."""
    record: Mapping[str, Any]
    """What all ranks know alike."""


def content_of(view: EngineView, directory: Path) -> Content:
    """All that a save of the optimizer writes; its tensors are the live ones. Collective.

    Args:
        view: Of what is saved.
        directory: Where to, for the message.
    """
    ranks = view.ranks
    pieces, scalars, groups, structure = attempt(lambda: _held(view), directory, ranks)
    held, verdict, counters = view.parts[0].holdings, view.spec.verdict, view.counters()
    extras, *others = attempt(lambda: [part.holdings.extras() for part in view.parts], directory, ranks)
    if not shared_extras(extras, held, *others):
        structure = ""
    record = {
        "optimizer": view.spec.name,
        "num_steps": view.optimizer.num_steps,
        "mode": view.optimizer.mode,
        "counters": held.counter_keys(),
        "param_groups": groups,
        "build": build_values(held),
        "shapes": {placed.fqn: list(placed.shape) for placed in view.placed},
    }
    if verdict is not None:
        record["stepped"] = {"independent": verdict.is_independent, "reason": verdict.reason}
    if counters:
        record["engine"] = counters
    orders = {name: order for name, piece in pieces.items() if (order := _memory_order(piece))}
    return Content(pieces, scalars, orders, structure, record)


def write_optimizer(directory: Path, content: Content, identity: str, ranks: dist.ProcessGroup | None) -> None:
    """Write record and tensors into an empty folder. Collective.

    Args:
        directory: The folder.
        content: What ``content_of`` returned here, or copies of it.
        identity: The word of this save.
        ranks: All that train the model.
    """
    write_pieces(directory / "tensors", content.pieces, ranks)
    gathered = gather_objects((content.scalars, content.memory_orders, content.structure), ranks)
    scalars = {fqn: values for one, _, _ in gathered for fqn, values in one.items()}
    record = {
        "format": FORMAT,
        "identity": identity,
        **content.record,
        "scalars": scalars,
        "census": census(scalars),
        "memory_orders": {name: order for _, one, _ in gathered for name, order in one.items()},
        "tensors": seal(directory / "tensors", ranks),
    }
    if structures := [one for _, _, one in gathered if one]:
        record["extras"] = structures[0]
    attempt(lambda: write_record(directory / RECORD, record) if own_rank(ranks) == 0 else None, directory, ranks)


def _held(view: EngineView) -> tuple[dict[str, Pieces], dict[str, dict[str, Any]], list[Any], str]:
    """This rank's tensors, by logical name, its scalars, by parameter, the param groups, and what extras look like."""
    view.look()
    pieces: dict[str, Pieces] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for held, instance, index in stepped_here(view):
        placed = held.placed[index]
        scalars[placed.fqn] = {}
        for key, value in instance.encoded_state(index).items():
            if not isinstance(value, Tensor):
                scalars[placed.fqn][key] = value
            elif is_slice(held, instance, index, value):
                whole = shape_of_whole(value.shape, placed)
                pieces[f"state/{placed.fqn}/{key}"] = Pieces.of(value, placed, whole)
            else:
                pieces[f"state/{placed.fqn}/{key}"] = Pieces.whole(value)
    pieces |= _separate_weights(view)
    held = view.parts[0].holdings
    extras: dict[str, Any] = held.extras() if held.rank == 0 else {}
    pieces |= {f"extras/{key}": Pieces.whole(value) for key, value in extras.items() if key != STRUCTURE}
    groups = rank_state.plain_groups(held)
    encoded_groups = [encoded(group, f"groups/{at}", pieces) for at, group in enumerate(groups)]
    return pieces, scalars, encoded_groups, extras.get(STRUCTURE, "")


def stepped_here(view: EngineView) -> Iterator[tuple[Holdings, UpstreamInstance, int]]:
    """What this rank has state of: whose parameter, who steps it, and its number there."""
    for part in view.parts:
        for instance, index in part.holdings.stepped_here():
            yield part.holdings, instance, index


def _memory_order(pieces: Pieces) -> list[int]:
    """The dims of a whole tensor from the outermost in memory to the innermost; empty where that is their own order.

    An SVD leaves its factors column by column, and a product of matrices rounds by how they lie in memory.
    """
    (tensor, *others) = pieces.blocks.values() or [torch.empty(0, device="cpu")]
    if others or tensor.shape != pieces.shape or tensor.is_contiguous():
        return []
    return list(memory_order(tensor))


def _separate_weights(view: EngineView) -> dict[str, Pieces]:
    """Training weights, where the model's part of a checkpoint does not hold them."""
    swaps = Trait.WEIGHT_SWAPPING in view.spec.traits and view.optimizer.mode == "train"
    if not swaps and not view.has_masters:
        return {}
    return {name_of_weights(one.fqn): Pieces.of(one.local(), one) for one in view.training_weights()}


def name_of_weights(fqn: str) -> str:
    """Name of a parameter's training weights among the tensors."""
    return f"weights/{fqn}"
