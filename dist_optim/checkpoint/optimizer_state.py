"""The state of a ``DistributedOptimizer`` on disk: logical tensors by parameter name, and one readable record.

::

    <directory>/optimizer.json    optimizer, steps, mode, param groups, hyperparameters of the build, scalars of the
                                  state; what binds it to the tensors (see identity)
    <directory>/tensors/          "state/<fqn>/<key>"; "weights/<fqn>" where what is trained is not what the model
                                  holds: of optimizers that swap weights, and masters of half precision

Nothing in it tells how parameters were sharded or who owned what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.building.arguments import listed_names
from dist_optim.checkpoint.blocks import Pieces, read_pieces, write_pieces
from dist_optim.checkpoint.build_values import build_values, check_build, with_values_of_build
from dist_optim.checkpoint.directory import attempt, opened, written_aside
from dist_optim.checkpoint.engine_view import EngineView, view_of
from dist_optim.checkpoint.fitting import check_content, check_decoded
from dist_optim.checkpoint.group_values import decoded, encoded
from dist_optim.checkpoint.identity import FORMAT, new_word, read_record, write_record
from dist_optim.checkpoint.index import StoredTensor, stored_tensors
from dist_optim.checkpoint.schema import OPTIMIZER, census
from dist_optim.checkpoint.seals import check_files, seal
from dist_optim.errors import CheckpointError, StateDictError
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.registry import Trait
from dist_optim.stepping import half_steps, rank_state
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.sharing import shared_extras
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.stepping.whole_state import is_slice, memory_order

__all__ = [
    "RECORD",
    "Incoming",
    "install",
    "load_optimizer",
    "look_into",
    "name_of_weights",
    "read_state",
    "refuse_half_step",
    "save_optimizer",
    "write_optimizer",
]

RECORD = "optimizer.json"


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
    """Storage of training weights that the folder holds; ``install`` reads into it."""
    extras: dict[str, Any]
    """What upstream keeps that is no parameter's, for a rank that has it; its tensors are room too."""
    changed: tuple[str, ...]
    """Hyperparameters that keep the value of the build."""


def save_optimizer(directory: str | Path, optimizer: Any) -> None:
    """Write the optimizer's state into a folder of its own. Collective on all ranks that train the model.

    An optimizer that swaps weights (schedule-free) also writes its training weights, unless the averaged ones are in
    place: so the model may be exported with the averaged weights, and training still goes on from where it was. So does
    an engine that trains masters of a model in half precision.

    Args:
        directory: Appears whole, or not at all; one that is there already is replaced.
        optimizer: A ``DistributedOptimizer``, DeepSpeed's ``engine.optimizer``, or accelerate's wrapper around one.

    Raises:
        CheckpointError: On all ranks; a checkpoint that was there is untouched.
    """
    view, directory = view_of(optimizer), Path(directory)
    view.meet("save_optimizer()")
    refuse_half_step(view)
    with written_aside(directory, view.ranks) as aside:
        write_optimizer(aside, view, new_word(view.ranks))


def load_optimizer(directory: str | Path, optimizer: Any, *, allow_changed: Iterable[str] = ()) -> None:
    """Install what ``save_optimizer`` wrote, under any sharding and world size. Collective on all ranks.

    Values of the groups, which a schedule may have moved, come from the checkpoint. Load the model's weights before.

    Args:
        directory: The folder.
        optimizer: As ``save_optimizer`` takes it.
        allow_changed: Names of hyperparameters that may be others than those that the saved optimizer was built with;
            they take the values of this build. A rate that a schedule has moved stays moved as far.

    Raises:
        CheckpointError: On all ranks: it is missing, incomplete or damaged.
        StateDictError: On all ranks: it belongs to another optimizer, model or arrangement of groups, or was built with
            other hyperparameters.
        HyperparameterError: On all ranks: ``allow_changed`` names none.
    """
    view, directory = view_of(optimizer), opened(Path(directory))
    view.meet("load_optimizer()")
    incoming = attempt(lambda: look_into(directory, view, allow_changed), directory, view.ranks, is_reading=True)
    read_state(view, incoming)
    install(view, incoming)


def look_into(directory: Path, view: EngineView, allow_changed: Iterable[str] = ()) -> Incoming:
    """Check that what is in the folder fits the optimizer and is whole. Not a collective; writes nothing.

    Raises:
        CheckpointError, StateDictError: As ``load_optimizer``; perhaps on this rank alone.
    """
    if reason := view.why_not_loaded():
        raise CheckpointError(reason)
    view.look()
    changed = tuple(listed_names("allow_changed", allow_changed))
    record = read_record(directory / RECORD, OPTIMIZER)
    _check_record(directory, view, record)
    check_build(directory, view.parts[0].holdings, record["build"], changed)
    check_files(directory / "tensors", own_rank(view.ranks), num_ranks(view.ranks), record["tensors"])
    stored = stored_tensors(directory / "tensors")
    check_content(directory, view.spec, record, stored)
    _check_weights(directory, view, stored)
    return _allocate(directory / "tensors", view, record, stored, changed)


def read_state(view: EngineView, incoming: Incoming) -> None:
    """Fill the room on the host, and find that it can be installed. Collective; the optimizer stays as it is."""
    read_pieces(incoming.tensors, incoming.room, view.ranks)
    groups = decoded(incoming.record["param_groups"], incoming.room)

    def check() -> None:
        for part in view.parts:
            check_decoded(part.holdings, incoming.state, groups)

    attempt(check, incoming.tensors.parent, view.ranks, is_reading=True)


def install(view: EngineView, incoming: Incoming) -> None:
    """Put state that has been read, and training weights, into place. Collective."""
    read_pieces(incoming.tensors, incoming.weights, view.ranks)
    attempt(lambda: _install(view, incoming), incoming.tensors.parent, view.ranks, is_reading=True)
    view.refresh()


def _groups_to_install(view: EngineView, incoming: Incoming) -> list[dict[str, Any]]:
    """The param groups that have been read, with the values of the build where those are to be kept."""
    groups = decoded(incoming.record["param_groups"], incoming.room)
    return with_values_of_build(view.parts[0].holdings, groups, incoming.record["build"], incoming.changed)


def _install(view: EngineView, incoming: Incoming) -> None:
    record, groups = incoming.record, _groups_to_install(view, incoming)
    for part in view.parts:
        rank_state.install(
            part.holdings,
            part.progress,
            state=incoming.state,
            groups=groups,
            counters=record["counters"],
            extras=incoming.extras,
            num_steps=record["num_steps"],
            mode=record["mode"],
        )
    view.take_counters(record.get("engine", {}), record["num_steps"])


def refuse_half_step(view: EngineView, weights: Iterable[nn.Parameter] = ()) -> None:
    """Nothing is saved between a step that failed half way, on all ranks alike, and a load.

    Args:
        view: Of the optimizer whose state is to be saved.
        weights: Also to be saved: another optimizer of theirs may have failed.

    Raises:
        CheckpointError: It is so.
    """
    if reason := view.why_not_saved() or half_steps.why_not_saved(weights):
        raise CheckpointError(reason)


def write_optimizer(directory: Path, view: EngineView, identity: str) -> None:
    """Write record and tensors into an empty folder. Collective.

    Args:
        directory: The folder.
        view: Of what is saved.
        identity: The word of this save.
    """
    ranks, is_first = view.ranks, own_rank(view.ranks) == 0
    pieces, scalars, groups, structure = attempt(lambda: _held(view), directory, ranks)
    held = view.parts[0].holdings
    extras, *others = attempt(lambda: [part.holdings.extras() for part in view.parts], directory, ranks)
    if not shared_extras(extras, held, *others):
        structure = ""
    write_pieces(directory / "tensors", pieces, ranks)
    memory_orders = {name: order for name, piece in pieces.items() if (order := _memory_order(piece))}
    gathered = gather_objects((scalars, memory_orders, structure), ranks)
    scalars = {fqn: values for one, _, _ in gathered for fqn, values in one.items()}
    verdict = view.spec.verdict
    record = {
        "format": FORMAT,
        "identity": identity,
        "optimizer": view.spec.name,
        "num_steps": view.optimizer.num_steps,
        "mode": view.optimizer.mode,
        "counters": held.counter_keys(),
        "param_groups": groups,
        "build": build_values(held),
        "shapes": {placed.fqn: list(placed.shape) for placed in view.placed},
        "scalars": scalars,
        "census": census(scalars),
        "memory_orders": {name: order for _, one, _ in gathered for name, order in one.items()},
        "tensors": seal(directory / "tensors", ranks),
    }
    if structures := [one for _, _, one in gathered if one]:
        record["extras"] = structures[0]
    if verdict is not None:
        record["stepped"] = {"independent": verdict.is_independent, "reason": verdict.reason}
    if counters := view.counters():
        record["engine"] = counters
    attempt(lambda: write_record(directory / RECORD, record) if is_first else None, directory, ranks)


def _held(view: EngineView) -> tuple[dict[str, Pieces], dict[str, dict[str, Any]], list[Any], str]:
    """This rank's tensors, by logical name, its scalars, by parameter, the param groups, and what extras look like."""
    view.look()
    pieces: dict[str, Pieces] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for held, instance, index in _stepped_here(view):
        placed = held.placed[index]
        scalars[placed.fqn] = {}
        for key, value in instance.encoded_state(index).items():
            if not isinstance(value, Tensor):
                scalars[placed.fqn][key] = value
            elif is_slice(held, instance, index, value):
                pieces[f"state/{placed.fqn}/{key}"] = Pieces.of(value, placed)
            else:
                pieces[f"state/{placed.fqn}/{key}"] = Pieces.whole(value)
    pieces |= _separate_weights(view)
    held = view.parts[0].holdings
    extras: dict[str, Any] = held.extras() if held.rank == 0 else {}
    pieces |= {f"extras/{key}": Pieces.whole(value) for key, value in extras.items() if key != STRUCTURE}
    groups = rank_state.plain_groups(held)
    encoded_groups = [encoded(group, f"groups/{at}", pieces) for at, group in enumerate(groups)]
    return pieces, scalars, encoded_groups, extras.get(STRUCTURE, "")


def _stepped_here(view: EngineView) -> Iterator[tuple[Holdings, UpstreamInstance, int]]:
    for part in view.parts:
        for instance, index in part.holdings.stepped_here():
            yield part.holdings, instance, index


def _memory_order(pieces: Pieces) -> list[int]:
    """The dims of a whole tensor from the outermost in memory to the innermost; empty where that is their own order.

    An SVD leaves its factors column by column, and a product of matrices rounds by how they lie in memory.
    """
    (tensor, *others) = pieces.blocks.values() or [torch.empty(0)]
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


def _check_record(directory: Path, view: EngineView, record: dict[str, Any]) -> None:
    if record["optimizer"] != view.spec.name:
        raise StateDictError(
            f"The checkpoint {str(directory)!r} is of {record['optimizer']!r}, but this optimizer is "
            f"{view.spec.name!r}. Build {record['optimizer']!r}, or start without the optimizer's state."
        )
    for placed in view.placed:
        saved = record["shapes"].get(placed.fqn)
        if saved is not None and saved != list(placed.shape):
            raise StateDictError(
                f"The checkpoint {str(directory)!r} has {placed.fqn!r} with shape {tuple(saved)}, but the model's is "
                f"{tuple(placed.shape)}. Load it into the model that it was saved from."
            )
    for part in view.parts:
        rank_state.check_groups(part.holdings, record["param_groups"])
        rank_state.check_extras(part.holdings, {STRUCTURE: record["extras"]} if record.get("extras") else {})


def _check_weights(directory: Path, view: EngineView, stored: Mapping[str, StoredTensor]) -> None:
    for one in view.training_weights():
        name = name_of_weights(one.fqn)
        if name in stored and stored[name].dtype != one.dtype:
            raise StateDictError(
                f"The checkpoint {str(directory)!r} was trained on {one.fqn!r} in {stored[name].dtype}, and here it is "
                f"trained on in {one.dtype}. Build the model in the dtype that was trained on: where an engine kept "
                "masters of a model in half precision, that is fp32."
            )


def _allocate(
    tensors: Path,
    view: EngineView,
    record: dict[str, Any],
    stored: Mapping[str, StoredTensor],
    changed: tuple[str, ...],
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
    for held, instance, index in _stepped_here(view):
        placed, is_local = held.placed[index], instance is held.local_instance
        values = dict(record["scalars"].get(placed.fqn, {}))
        for key in keys_of.get(placed.fqn, []):
            name = f"state/{placed.fqn}/{key}"
            is_cut = is_local and stored[name].shape == placed.shape and placed.shape != torch.Size()
            shape = placed.local().shape if is_cut else stored[name].shape
            order = None if is_cut else record["memory_orders"].get(name)
            values[key] = torch.empty_permuted(shape, order or list(range(len(shape))), dtype=stored[name].dtype)
            pieces[name] = Pieces.of(values[key], placed) if is_cut else Pieces.whole(values[key])
        if values:
            state[placed.fqn] = values
    for name in stored:
        if name.startswith("groups/"):
            pieces[name] = Pieces.whole(torch.empty(stored[name].shape, dtype=stored[name].dtype))
    weights = {
        name: Pieces.of(one.local(), one)
        for one in view.training_weights()
        if (name := name_of_weights(one.fqn)) in stored
    }
    extras: dict[str, Any] = {}
    if record.get("extras") and any(one.extras for part in view.parts for one in part.holdings.instances):
        rooms = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in stored.items() if name[:7] == "extras/"}
        pieces |= {name: Pieces.whole(room) for name, room in rooms.items()}
        extras = {name[7:]: room for name, room in rooms.items()} | {STRUCTURE: record["extras"]}
    return Incoming(tensors, record, state, pieces, weights, extras, changed)
