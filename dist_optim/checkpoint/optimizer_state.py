"""The state of a ``DistributedOptimizer`` on disk: logical tensors by parameter name, and one readable record.

::

    <directory>/optimizer.json    optimizer, steps, mode, param groups, scalars of the state
    <directory>/tensors/          "state/<fqn>/<key>"; "weights/<fqn>" of optimizers that swap weights

Nothing in it tells how parameters were sharded or who owned what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.checkpoint.blocks import Pieces, read_pieces, write_pieces
from dist_optim.checkpoint.directory import attempt, opened, read_json, write_json, written_aside
from dist_optim.checkpoint.group_values import decoded, encoded
from dist_optim.checkpoint.index import StoredTensor, check_files, stored_tensors
from dist_optim.errors import CheckpointError, StateDictError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.registry import Trait
from dist_optim.specs.unwrapping import find_optimizer
from dist_optim.stepping import half_steps, rank_state
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.stepping.sharing import shared_extras
from dist_optim.stepping.whole_state import is_slice, memory_order

__all__ = [
    "Incoming",
    "install",
    "load_optimizer",
    "look_into",
    "optimizer_of",
    "read_state",
    "refuse_half_step",
    "save_optimizer",
    "write_optimizer",
]

RECORD = "optimizer.json"
FORMAT = 1
_RECORDED = {
    "optimizer": str,
    "num_steps": int,
    "mode": str,
    "counters": list,
    "param_groups": list,
    "shapes": dict,
    "scalars": dict,
    "memory_orders": dict,
}


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a folder holds for this rank, found to fit the optimizer; nothing of it is installed yet."""

    tensors: Path
    record: dict[str, Any]
    state: dict[str, dict[str, Any]]
    """By parameter; its tensors are room on the host, which ``read_state`` fills."""
    room: dict[str, Pieces]
    """The same room, and that of tensors in the groups, as blocks to be read."""
    weights: dict[str, Pieces]
    """The model's own storage, for training weights that the folder holds; ``install`` reads into it."""
    extras: dict[str, Any]
    """What upstream keeps that is no parameter's, for a rank that has it; its tensors are room too."""


def save_optimizer(directory: str | Path, optimizer: Any) -> None:
    """Write the optimizer's state into a folder of its own. Collective on all ranks that train the model.

    An optimizer that swaps weights (schedule-free) also writes its training weights, unless the averaged ones are in
    place: so the model may be exported with the averaged weights, and training still goes on from where it was.

    Args:
        directory: Appears whole, or not at all; one that is there already is replaced.
        optimizer: A ``DistributedOptimizer``, or accelerate's wrapper around one.

    Raises:
        CheckpointError: On all ranks; a checkpoint that was there is untouched.
    """
    inner, directory = optimizer_of(optimizer), Path(directory)
    inner.meet("save_optimizer()")
    refuse_half_step(inner)
    with written_aside(directory, inner.holdings.all_ranks) as aside:
        write_optimizer(aside, inner)


def load_optimizer(directory: str | Path, optimizer: Any) -> None:
    """Install what ``save_optimizer`` wrote, under any sharding and world size. Collective on all ranks.

    Hyperparameters of the groups come from the checkpoint too, as torch's ``load_state_dict`` has it. Load the model's
    weights before.

    Raises:
        CheckpointError: On all ranks: it is missing, incomplete or damaged.
        StateDictError: On all ranks: it belongs to another optimizer, model or arrangement of groups.
    """
    inner, directory = optimizer_of(optimizer), opened(Path(directory))
    inner.meet("load_optimizer()")
    ranks = inner.holdings.all_ranks
    incoming = attempt(lambda: look_into(directory, inner), directory, ranks, is_reading=True)
    read_state(inner, incoming)
    install(inner, incoming)


def look_into(directory: Path, optimizer: DistributedOptimizer) -> Incoming:
    """Check that what is in the folder fits the optimizer and is whole. Not a collective; writes nothing.

    Raises:
        CheckpointError, StateDictError: As ``load_optimizer``; perhaps on this rank alone.
    """
    ranks = optimizer.holdings.all_ranks
    record, stored = _checked(directory, optimizer)
    check_files(directory / "tensors", own_rank(ranks), num_ranks(ranks))
    return _allocate(directory / "tensors", optimizer, record, stored)


def read_state(optimizer: DistributedOptimizer, incoming: Incoming) -> None:
    """Fill the room on the host. Collective; the optimizer stays as it is."""
    read_pieces(incoming.tensors, incoming.room, optimizer.holdings.all_ranks)


def install(optimizer: DistributedOptimizer, incoming: Incoming) -> None:
    """Put state that has been read, and training weights, into place. Collective."""
    record = incoming.record
    read_pieces(incoming.tensors, incoming.weights, optimizer.holdings.all_ranks)
    attempt(
        lambda: rank_state.install(
            optimizer.holdings,
            optimizer.progress,
            state=incoming.state,
            groups=decoded(record["param_groups"], incoming.room),
            counters=record["counters"],
            extras=incoming.extras,
            num_steps=record["num_steps"],
            mode=record["mode"],
        ),
        incoming.tensors.parent,
        optimizer.holdings.all_ranks,
        is_reading=True,
    )
    optimizer.free_gathered_copies()


def optimizer_of(optimizer: Any) -> DistributedOptimizer:
    """The ``DistributedOptimizer`` itself, out of accelerate's wrapper."""
    inner = find_optimizer(optimizer, DistributedOptimizer)
    if inner is None:
        raise CheckpointError(
            f"{type(optimizer).__name__} was not built by dist_optim. Pass what build_optimizer or prepare returned; "
            "under DeepSpeed save and load through the engine."
        )
    return inner


def refuse_half_step(optimizer: DistributedOptimizer, weights: Iterable[nn.Parameter] = ()) -> None:
    """Nothing is saved between a step that failed half way, on all ranks alike, and a load.

    Args:
        optimizer: Whose state is to be saved.
        weights: Also to be saved: another optimizer of theirs may have failed.

    Raises:
        CheckpointError: It is so.
    """
    if reason := optimizer.progress.why_not_saved() or half_steps.why_not_saved(weights):
        raise CheckpointError(reason)


def write_optimizer(directory: Path, optimizer: DistributedOptimizer) -> None:
    """Write record and tensors into an empty folder. Collective."""
    ranks, is_first = optimizer.holdings.all_ranks, own_rank(optimizer.holdings.all_ranks) == 0
    pieces, scalars, groups, structure = attempt(lambda: _held(optimizer), directory, ranks)
    held = optimizer.holdings
    if not shared_extras(attempt(held.extras, directory, ranks), held):
        structure = ""
    write_pieces(directory / "tensors", pieces, ranks)
    memory_orders = {name: order for name, piece in pieces.items() if (order := _memory_order(piece))}
    gathered = gather_objects((scalars, memory_orders, structure), ranks)
    verdict = optimizer.spec.verdict
    record = {
        "format": FORMAT,
        "optimizer": optimizer.spec.name,
        "num_steps": optimizer.num_steps,
        "mode": optimizer.mode,
        "counters": optimizer.holdings.counter_keys(),
        "param_groups": groups,
        "shapes": {placed.fqn: list(placed.shape) for placed in optimizer.holdings.placed},
        "scalars": {fqn: values for one, _, _ in gathered for fqn, values in one.items()},
        "memory_orders": {name: order for _, one, _ in gathered for name, order in one.items()},
    }
    if structures := [one for _, _, one in gathered if one]:
        record["extras"] = structures[0]
    if verdict is not None:
        record["stepped"] = {"independent": verdict.is_independent, "reason": verdict.reason}
    attempt(lambda: write_json(directory / RECORD, record) if is_first else None, directory, ranks)


def _held(optimizer: DistributedOptimizer) -> tuple[dict[str, Pieces], dict[str, dict[str, Any]], list[Any], str]:
    """This rank's tensors, by logical name, its scalars, by parameter, the param groups, and what extras look like."""
    pieces: dict[str, Pieces] = {}
    scalars: dict[str, dict[str, Any]] = {}
    everything = optimizer.holdings.placed
    for instance, index in optimizer.holdings.stepped_here():
        placed = everything[index]
        scalars[placed.fqn] = {}
        for key, value in instance.encoded_state(index).items():
            if not isinstance(value, Tensor):
                scalars[placed.fqn][key] = value
            elif is_slice(optimizer.holdings, instance, index, value):
                pieces[f"state/{placed.fqn}/{key}"] = _part(value, placed)
            else:
                pieces[f"state/{placed.fqn}/{key}"] = Pieces.whole(value)
    pieces |= _training_weights(optimizer)
    extras: dict[str, Any] = optimizer.holdings.extras() if optimizer.holdings.rank == 0 else {}
    pieces |= {f"extras/{key}": Pieces.whole(value) for key, value in extras.items() if key != STRUCTURE}
    groups = rank_state.plain_groups(optimizer.holdings)
    encoded_groups = [encoded(group, f"groups/{at}", pieces) for at, group in enumerate(groups)]
    return pieces, scalars, encoded_groups, extras.get(STRUCTURE, "")


def _memory_order(pieces: Pieces) -> list[int]:
    """The dims of a whole tensor from the outermost in memory to the innermost; empty where that is their own order.

    An SVD leaves its factors column by column, and a product of matrices rounds by how they lie in memory.
    """
    (tensor, *others) = pieces.blocks.values() or [torch.empty(0)]
    if others or tensor.shape != pieces.shape or tensor.is_contiguous():
        return []
    return list(memory_order(tensor))


def _training_weights(optimizer: DistributedOptimizer) -> dict[str, Pieces]:
    if Trait.WEIGHT_SWAPPING not in optimizer.spec.traits or optimizer.mode != "train":
        return {}
    return _weights([one for one in optimizer.holdings.placed if one.is_trained])


def _weights(placed: Iterable[PlacedParameter]) -> dict[str, Pieces]:
    return {f"weights/{one.fqn}": _part(one.local(), one) for one in placed if not isinstance(one.layout, Elsewhere)}


def _part(local: Tensor, placed: PlacedParameter) -> Pieces:
    return Pieces.part(local, placed.layout, placed.shape, own_rank(placed.process_group))


def _checked(directory: Path, optimizer: DistributedOptimizer) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The record and the directory of tensors, when they fit the optimizer."""
    record = read_json(directory / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(directory / RECORD)!r} has a format that this version of dist_optim does not know. Load it with the "
            "version that wrote it."
        )
    for key, kind in _RECORDED.items():
        if not isinstance(record.get(key), kind):
            raise CheckpointError(
                f"{str(directory / RECORD)!r} is damaged: {key} is {record.get(key)!r}. Resume from another checkpoint."
            )
    if record["optimizer"] != optimizer.spec.name:
        raise StateDictError(
            f"The checkpoint {str(directory)!r} is of {record['optimizer']!r}, but this optimizer is "
            f"{optimizer.spec.name!r}. Build {record['optimizer']!r}, or start without the optimizer's state."
        )
    for placed in optimizer.holdings.placed:
        saved = record["shapes"].get(placed.fqn)
        if saved is not None and saved != list(placed.shape):
            raise StateDictError(
                f"The checkpoint {str(directory)!r} has {placed.fqn!r} with shape {tuple(saved)}, but the model's is "
                f"{tuple(placed.shape)}. Load it into the model that it was saved from."
            )
    rank_state.check_groups(optimizer.holdings, record["param_groups"])
    rank_state.check_extras(optimizer.holdings, {STRUCTURE: record["extras"]} if record.get("extras") else {})
    stored = stored_tensors(directory / "tensors")
    for name, weight in _weights(optimizer.holdings.placed).items():
        if name in stored and stored[name].dtype != weight.dtype:
            raise StateDictError(
                f"The checkpoint {str(directory)!r} has {name!r} in {stored[name].dtype}, and the model in "
                f"{weight.dtype}. Build the model in the dtype that it was saved in."
            )
    return record, stored


def _allocate(
    tensors: Path, optimizer: DistributedOptimizer, record: dict[str, Any], stored: Mapping[str, StoredTensor]
) -> Incoming:
    """Room on the host for the state that this rank steps."""
    keys_of: dict[str, list[str]] = {}
    for name in stored:
        kind, _, rest = name.partition("/")
        fqn, _, key = rest.rpartition("/")
        if kind == "state":
            keys_of.setdefault(fqn, []).append(key)
    state: dict[str, dict[str, Any]] = {}
    pieces: dict[str, Pieces] = {}
    everything = optimizer.holdings.placed
    for instance, index in optimizer.holdings.stepped_here():
        placed, is_local = everything[index], instance is optimizer.holdings.local_instance
        values = dict(record["scalars"].get(placed.fqn, {}))
        for key in keys_of.get(placed.fqn, []):
            name = f"state/{placed.fqn}/{key}"
            is_cut = is_local and stored[name].shape == placed.shape and placed.shape != torch.Size()
            shape = placed.local().shape if is_cut else stored[name].shape
            order = None if is_cut else record["memory_orders"].get(name)
            values[key] = torch.empty_permuted(shape, order or list(range(len(shape))), dtype=stored[name].dtype)
            pieces[name] = _part(values[key], placed) if is_cut else Pieces.whole(values[key])
        if values:
            state[placed.fqn] = values
    for name in stored:
        if name.startswith("groups/"):
            pieces[name] = Pieces.whole(torch.empty(stored[name].shape, dtype=stored[name].dtype))
    weights = {name: weight for name, weight in _weights(everything).items() if name in stored}
    extras: dict[str, Any] = {}
    if record.get("extras") and any(instance.extras for instance in optimizer.holdings.instances):
        rooms = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in stored.items() if name[:7] == "extras/"}
        pieces |= {name: Pieces.whole(room) for name, room in rooms.items()}
        extras = {name[7:]: room for name, room in rooms.items()} | {STRUCTURE: record["extras"]}
    return Incoming(tensors, record, state, pieces, weights, extras)
