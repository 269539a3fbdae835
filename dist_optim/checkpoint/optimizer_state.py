"""The state of a ``DistributedOptimizer`` on disk: logical tensors by parameter name, and one readable record.

::

    <directory>/optimizer.json    optimizer, steps, mode, param groups, scalars of the state
    <directory>/tensors/          "state/<fqn>/<key>"; "weights/<fqn>" of optimizers that swap weights

Nothing in it tells how parameters were sharded or who owned what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_optim.checkpoint.blocks import Pieces, StoredTensor, read_pieces, stored_tensors, write_pieces
from dist_optim.checkpoint.directory import attempt, opened, read_json, write_json, written_aside
from dist_optim.errors import CheckpointError, StateDictError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.specs.registry import Trait
from dist_optim.stepping import rank_state
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["load_optimizer", "optimizer_of", "save_optimizer"]

RECORD = "optimizer.json"
FORMAT = 1


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
    record, stored = attempt(lambda: _checked(directory, inner), directory, inner.holdings.all_ranks)
    state, pieces = _allocate(inner, record, stored)
    read_pieces(directory / "tensors", pieces, inner.holdings.all_ranks)
    rank_state.install(
        inner.holdings,
        inner.progress,
        state=state,
        groups=_decoded(record["param_groups"], pieces),
        counters=record["counters"],
        num_steps=record["num_steps"],
        mode=record["mode"],
    )
    inner.free_gathered_copies()


def optimizer_of(optimizer: Any) -> DistributedOptimizer:
    """The ``DistributedOptimizer`` itself, out of accelerate's wrapper."""
    inner = optimizer
    while not isinstance(inner, DistributedOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, DistributedOptimizer):
        raise CheckpointError(
            f"{type(optimizer).__name__} was not built by dist_optim. Pass what build_optimizer or prepare returned; "
            "under DeepSpeed save and load through the engine."
        )
    return inner


def write_optimizer(directory: Path, optimizer: DistributedOptimizer) -> None:
    """Write record and tensors into an empty folder. Collective."""
    pieces, scalars = _held(optimizer)
    groups = [
        _encoded(group, f"groups/{at}", pieces) for at, group in enumerate(rank_state.plain_groups(optimizer.holdings))
    ]
    write_pieces(directory / "tensors", pieces, optimizer.holdings.all_ranks)
    memory_orders = {name: order for name, piece in pieces.items() if (order := _memory_order(piece))}
    gathered = gather_objects((scalars, memory_orders), optimizer.holdings.all_ranks)
    record = {
        "format": FORMAT,
        "optimizer": optimizer.spec.name,
        "num_steps": optimizer.num_steps,
        "mode": optimizer.mode,
        "counters": optimizer.holdings.counter_keys(),
        "param_groups": groups,
        "shapes": {placed.fqn: list(placed.shape) for placed in optimizer.holdings.placed},
        "scalars": {fqn: values for one, _ in gathered for fqn, values in one.items()},
        "memory_orders": {name: order for _, one in gathered for name, order in one.items()},
    }
    is_first = own_rank(optimizer.holdings.all_ranks) == 0
    attempt(
        lambda: write_json(directory / RECORD, record) if is_first else None, directory, optimizer.holdings.all_ranks
    )


def _held(optimizer: DistributedOptimizer) -> tuple[dict[str, Pieces], dict[str, dict[str, Any]]]:
    """This rank's tensors, by logical name, and its scalars, by parameter."""
    pieces: dict[str, Pieces] = {}
    scalars: dict[str, dict[str, Any]] = {}
    everything = optimizer.holdings.placed
    for instance, index in optimizer.holdings.stepped_here():
        placed, is_slice = everything[index], instance is optimizer.holdings.local_instance
        scalars[placed.fqn] = {}
        for key, value in instance.encoded_state(index).items():
            if not isinstance(value, Tensor):
                scalars[placed.fqn][key] = value
            elif is_slice and value.ndim and value.shape == placed.local().shape:
                pieces[f"state/{placed.fqn}/{key}"] = _part(value, placed)
            else:
                pieces[f"state/{placed.fqn}/{key}"] = Pieces.whole(value)
    return {**pieces, **_training_weights(optimizer)}, scalars


def _memory_order(pieces: Pieces) -> list[int]:
    """The dims of a whole tensor from the outermost in memory to the innermost; empty where that is their own order.

    An SVD leaves its factors column by column, and a product of matrices rounds by how they lie in memory.
    """
    (tensor, *others) = pieces.blocks.values() or [torch.empty(0)]
    if others or tensor.shape != pieces.shape or tensor.is_contiguous():
        return []
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _training_weights(optimizer: DistributedOptimizer) -> dict[str, Pieces]:
    if Trait.WEIGHT_SWAPPING not in optimizer.spec.traits or optimizer.mode != "train":
        return {}
    return _weights([one for one in optimizer.holdings.placed if one.parameter.requires_grad])


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
    return record, stored_tensors(directory / "tensors")


def _allocate(
    optimizer: DistributedOptimizer, record: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, dict[str, Any]], dict[str, Pieces]]:
    """Room for the state that this rank steps, by parameter, and the same as blocks to be read."""
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
        placed, is_slice = everything[index], instance is optimizer.holdings.local_instance
        values = dict(record["scalars"].get(placed.fqn, {}))
        for key in keys_of.get(placed.fqn, []):
            name = f"state/{placed.fqn}/{key}"
            is_cut = is_slice and stored[name].shape == placed.shape and placed.shape != torch.Size()
            shape = placed.local().shape if is_cut else stored[name].shape
            order = None if is_cut else record["memory_orders"].get(name)
            values[key] = torch.empty_permuted(shape, order or list(range(len(shape))), dtype=stored[name].dtype)
            pieces[name] = _part(values[key], placed) if is_cut else Pieces.whole(values[key])
        if values:
            state[placed.fqn] = values
    pieces |= {name: room for name, room in _weights(everything).items() if name in stored}
    for name in stored:
        if name.startswith("groups/"):
            pieces[name] = Pieces.whole(torch.empty(stored[name].shape, dtype=stored[name].dtype))
    return state, pieces


def _encoded(value: Any, name: str, pieces: dict[str, Pieces]) -> Any:
    """A param group's value as JSON has it: tuples are marked, tensors go among the pieces, other objects stay out."""
    if isinstance(value, dict):
        kept = {key: _encoded(item, f"{name}/{key}", pieces) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not NotImplemented}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, f"{name}/{at}", pieces) for at, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Tensor):
        pieces[name] = Pieces.whole(value)
        return {"tensor": name}
    return value if value is None or isinstance(value, (bool, int, float, str)) else NotImplemented


def _decoded(value: Any, pieces: Mapping[str, Pieces]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, pieces) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(_decoded(item, pieces) for item in value["tuple"])
    if value.keys() == {"tensor"}:
        (tensor,) = pieces[value["tensor"]].blocks.values()
        return tensor
    return {key: _decoded(item, pieces) for key, item in value.items()}
