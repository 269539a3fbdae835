"""``save_optimizer`` and ``load_optimizer``: an optimizer's state on disk (``optimizer_content``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_optim.building.arguments import listed_names
from dist_optim.checkpoint.beside_training import begin, own_copies, write_beside
from dist_optim.checkpoint.blocks import Pieces, read_pieces
from dist_optim.checkpoint.build_values import check_build, with_values_of_build
from dist_optim.checkpoint.directory import attempt, opened, written_aside
from dist_optim.checkpoint.engine_view import EngineView, view_of
from dist_optim.checkpoint.fitting import check_content, check_decoded
from dist_optim.checkpoint.group_values import decoded
from dist_optim.checkpoint.identity import new_word, read_record
from dist_optim.checkpoint.index import StoredTensor, indexes_kept, stored_tensors
from dist_optim.checkpoint.optimizer_content import (
    RECORD,
    Content,
    content_of,
    name_of_weights,
    stepped_here,
    write_optimizer,
)
from dist_optim.checkpoint.schema import OPTIMIZER
from dist_optim.checkpoint.seals import check_files
from dist_optim.errors import CheckpointError, StateDictError
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.specs.driver import STRUCTURE
from dist_optim.stepping import half_steps, rank_state
from dist_optim.stepping.whole_state import is_cut, shape_of_part

__all__ = [
    "Incoming",
    "copied_optimizer",
    "install",
    "load_optimizer",
    "look_into",
    "read_state",
    "refuse_half_step",
    "save_optimizer",
]


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


def save_optimizer(directory: str | Path, optimizer: Any, *, asynchronous: bool = False) -> None:
    """Write the optimizer's state into a folder of its own. Collective on all ranks that train the model.

    An optimizer that swaps weights (schedule-free) also writes its training weights, unless the averaged ones are in
    place: so the model may be exported with the averaged weights, and training still goes on from where it was. So does
    an engine that trains masters of a model in half precision.

    Args:
        directory: Appears whole, or not at all; one that is there already is replaced.
        optimizer: A ``DistributedOptimizer``, DeepSpeed's ``engine.optimizer``, or accelerate's wrapper around one.
        asynchronous: Whether it is written beside the training: see ``save_checkpoint``.

    Raises:
        CheckpointError: On all ranks; a checkpoint that was there is untouched.
    """
    view, directory = view_of(optimizer), Path(directory)
    begin("save_optimizer()", view, {"asynchronous": asynchronous})
    if asynchronous:
        write_beside(copied_optimizer(directory, optimizer), directory, view.ranks)
    else:
        refuse_half_step(view)
        _write(directory, content_of(view, directory), view.ranks)


def copied_optimizer(directory: Path, optimizer: Any) -> Callable[[dist.ProcessGroup | None], None]:
    """A copy of what ``save_optimizer`` would write now; what is returned writes it. Both are collective.

    Args:
        directory: Where it is going to be written.
        optimizer: As ``save_optimizer`` takes it.

    Returns:
        To be called on all ranks with a group of them, when nothing else is to use that.

    Raises:
        CheckpointError: On all ranks: it cannot be saved, or one rank has no room for the copy.
    """
    view = view_of(optimizer)
    refuse_half_step(view)
    content = content_of(view, directory)
    copied = replace(content, pieces=own_copies(content.pieces, directory, view.ranks))
    return lambda ranks: _write(directory, copied, ranks)


def _write(directory: Path, content: Content, ranks: dist.ProcessGroup | None) -> None:
    with written_aside(directory, ranks) as aside:
        write_optimizer(aside, content, new_word(ranks), ranks)


@indexes_kept()
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
    begin("load_optimizer()", view)
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
            may_keep=True,
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
    for held, instance, index in stepped_here(view):
        placed = held.placed[index]
        is_local = instance is held.local_instance and not placed.layout.is_replicated
        values = dict(record["scalars"].get(placed.fqn, {}))
        for key in keys_of.get(placed.fqn, []):
            name = f"state/{placed.fqn}/{key}"
            whole = stored[name].shape
            is_part = is_local and is_cut(whole, placed)
            shape = shape_of_part(whole, placed) if is_part else whole
            order = None if is_part else record["memory_orders"].get(name)
            values[key] = torch.empty_permuted(
                shape, order or list(range(len(shape))), dtype=stored[name].dtype, device="cpu"
            )
            pieces[name] = Pieces.of(values[key], placed, whole) if is_part else Pieces.whole(values[key])
        if values:
            state[placed.fqn] = values
    for name in stored:
        if name.startswith("groups/"):
            pieces[name] = Pieces.whole(torch.empty(stored[name].shape, dtype=stored[name].dtype, device="cpu"))
    weights = {
        name: Pieces.of(one.local(), one)
        for one in view.training_weights()
        if (name := name_of_weights(one.fqn)) in stored
    }
    extras: dict[str, Any] = {}
    if record.get("extras") and any(one.extras for part in view.parts for one in part.holdings.instances):
        rooms = {
            name: torch.empty(one.shape, dtype=one.dtype, device="cpu")
            for name, one in stored.items()
            if name[:7] == "extras/"
        }
        pieces |= {name: Pieces.whole(room) for name, room in rooms.items()}
        extras = {name[7:]: room for name, room in rooms.items()} | {STRUCTURE: record["extras"]}
    return Incoming(tensors, record, state, pieces, weights, extras, changed)
