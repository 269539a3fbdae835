"""``save_checkpoint`` and ``load_checkpoint``: model, optimizer and schedule in one folder.

::

    <directory>/checkpoint.json         what is in it, and what binds it together (see identity)
    <directory>/model/                  weights and buffers by their names in the user's model; the averaged weights
                                        where the optimizer averages. Readable by torch.distributed.checkpoint
    <directory>/optimizer/              see optimizer_state
    <directory>/scheduler.pt            the schedule's state_dict()
    <directory>/ranks/<rank>.pt         what each rank gave as `own`

All of it is read without running code from the files.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_optim.checkpoint.beside_training import begin, own_copies, write_beside
from dist_optim.checkpoint.blocks import Pieces, read_pieces
from dist_optim.checkpoint.build_values import RATE, let_follow
from dist_optim.checkpoint.directory import attempt, contents, opened
from dist_optim.checkpoint.engine_view import EngineView, view_of
from dist_optim.checkpoint.exported import exported_weights
from dist_optim.checkpoint.identity import check_part, check_same_save, read_record
from dist_optim.checkpoint.index import StoredTensor, indexes_kept, stored_tensors
from dist_optim.checkpoint.model_weights import pieces_of_model
from dist_optim.checkpoint.optimizer_content import content_of, name_of_weights
from dist_optim.checkpoint.optimizer_state import Incoming, install, look_into, read_state, refuse_half_step
from dist_optim.checkpoint.run_content import OPTIMIZER, RECORD, SCHEDULE, Run, own_file_of, plain_files, write_run
from dist_optim.checkpoint.schema import CHECKPOINT
from dist_optim.checkpoint.seals import check_files
from dist_optim.errors import CheckpointError, DistOptimError
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.stepping import half_steps

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    *,
    own: Any = None,
    rehearse: bool = False,
    asynchronous: bool = False,
) -> None:
    """Write a run into a folder. Collective on all ranks that train the model, also under DDP.

    Args:
        directory: On a disk that all ranks share. It appears whole, or not at all; one that is there is replaced.
        model: As it is trained: wrapped, sharded; DeepSpeed's engine.
        optimizer: Its ``DistributedOptimizer``, DeepSpeed's ``engine.optimizer``, or accelerate's wrapper around one.
        scheduler: Anything with a ``state_dict()`` of plain values, or None.
        own: Plain values of this rank (progress, the state of random generators) that ``load_checkpoint`` returns.
        rehearse: Whether all is read again, the state into new instances of upstream, and compared, before the folder
            appears: for a first save, so that what cannot be resumed is known then. It takes twice this rank's state.
        asynchronous: Whether training goes on while it is written. The call returns when this rank's own part is copied
            to the host; the checkpoint is of that moment. The next save or load waits for it, the end of the process
            does, and so does ``checkpoint.wait_for_saves()``. What fails then, the next call of all ranks raises, a
            step too.

    Raises:
        CheckpointError: On all ranks; a checkpoint that was there is untouched. A ``BackgroundSaveError`` is about the
            last save, which was asynchronous; nothing of this one was done.
    """
    view, directory = view_of(optimizer), Path(directory)
    begin("save_checkpoint()", view, {"rehearse": rehearse, "asynchronous": asynchronous})
    ranks, scheduler = view.ranks, view.schedule if scheduler is None else scheduler
    if rehearse and asynchronous:
        raise CheckpointError(
            f"{str(directory)!r} cannot be compared with a run that has gone on: rehearse=True waits until all is read "
            "again. Rehearse the first save alone, and save with asynchronous=True after it."
        )
    attempt(lambda: view.model_parameters(model), directory, ranks)
    refuse_half_step(view, model.parameters())

    @contextmanager
    def weights() -> Iterator[dict[str, Pieces]]:
        with exported_weights(view):
            yield attempt(lambda: pieces_of_model(model, view.model_parameters(model)), directory, ranks)

    files = attempt(lambda: plain_files(own_rank(ranks), scheduler, own), directory, ranks)
    about = {"optimizer": view.spec.name, "steps": view.optimizer.num_steps}
    live = Run(weights, lambda: content_of(view, directory), files, about)
    if asynchronous:
        copied = _copied(live, directory, ranks)
        write_beside(lambda group: write_run(directory, copied, group), directory, ranks)
    else:
        write_run(directory, live, ranks, view if rehearse else None)


def _copied(run: Run, directory: Path, ranks: dist.ProcessGroup | None) -> Run:
    """The same, on memory of its own. Collective."""
    with run.weights() as held:
        weights = own_copies(held, directory, ranks)
    content = run.optimizer()
    content = replace(content, pieces=own_copies(content.pieces, directory, ranks))
    return replace(run, weights=lambda: nullcontext(weights), optimizer=lambda: content)


@indexes_kept()
def load_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    *,
    allow_changed: Iterable[str] = (),
) -> Any:
    """Install what ``save_checkpoint`` wrote, under any sharding and world size. Collective on all ranks.

    Everything is checked, on all ranks, before anything is changed: what refuses, changes nothing.

    Args:
        directory: The folder.
        model: As ``save_checkpoint`` takes it.
        optimizer: As ``save_checkpoint`` takes it.
        scheduler: The schedule that is to go on, or None.
        allow_changed: Names of hyperparameters that may be others than those that the saved optimizer was built with;
            they take the values of this build. A rate that a schedule has moved stays moved as far, from the new one.

    Returns:
        What this rank gave as ``own``; under another world size, what rank 0 gave.

    Raises:
        CheckpointError: On all ranks: the folder is missing, incomplete, damaged, put together from parts of several,
            or of another model.
        StateDictError: On all ranks: it was saved from another optimizer, from other param groups, or from one that was
            built with other hyperparameters.
        HyperparameterError: On all ranks: ``allow_changed`` names none.
    """
    view, directory = view_of(optimizer), opened(Path(directory))
    begin("load_checkpoint()", view)
    ranks = view.ranks

    def look() -> tuple[Incoming, dict[str, Pieces], dict[str, Pieces], Any, Any]:
        about = read_record(directory / RECORD, CHECKPOINT)
        check_part(directory, OPTIMIZER, about)
        incoming = look_into(directory / "optimizer", view, allow_changed)
        check_same_save(directory, about, incoming.record)
        rooms, targets = _rooms_for_model(directory / "model", model, view, incoming)
        check_files(directory / "model", own_rank(ranks), num_ranks(ranks), about["model"])
        return incoming, rooms, targets, *_read_plain(directory, about, ranks, scheduler)

    incoming, rooms, targets, schedule, own = attempt(look, directory, ranks, is_reading=True)
    read_state(view, incoming)
    if scheduler is None and schedule is not None:
        scheduler = view.schedule
    if scheduler is not None:
        _install_schedule(directory, scheduler, schedule, ranks)
    read_pieces(directory / "model", rooms, ranks)
    for name, target in targets.items():
        target.fill(rooms[name])
    half_steps.heal(model.parameters())
    install(view, incoming)
    if scheduler is not None and RATE in incoming.changed:
        attempt(lambda: let_follow(scheduler, view.optimizer.param_groups), directory, ranks, is_reading=True)
    return own


def _install_schedule(directory: Path, scheduler: Any, saved: Any, ranks: dist.ProcessGroup | None) -> None:
    """Where one rank's schedule refuses, every rank's is as it was. Collective."""
    before = attempt(lambda: copy.deepcopy(scheduler.state_dict()), directory, ranks, is_reading=True)
    try:
        attempt(lambda: scheduler.load_state_dict(saved), directory, ranks, is_reading=True)
    except DistOptimError:
        with suppress(Exception):  # the one that refuses may refuse its own state too
            scheduler.load_state_dict(before)
        raise


def _rooms_for_model(
    folder: Path, model: nn.Module, view: EngineView, incoming: Incoming
) -> tuple[dict[str, Pieces], dict[str, Pieces]]:
    """What is to be read into, by name; and where that is then to be copied to, where the dtypes differ.

    What is trained is read from the training weights, where the checkpoint has such, and then not from the model's.
    """
    stored, held = stored_tensors(folder), view.model_parameters(model)
    changing = {name for name, one in held.items() if one.is_trained}
    trained = {one.fqn: Pieces.of(one.local(), one) for one in view.training_weights()}
    targets = pieces_of_model(model, held) | trained
    is_separate = {name for name in trained if name_of_weights(name) in incoming.weights}

    def fits(name: str) -> bool:
        there, here = stored.get(name), targets.get(name)
        if there is None or here is None or there.shape != here.shape:
            return False
        is_half_of_it = _is_wider(here.dtype, there.dtype) or (view.has_masters and _is_wider(there.dtype, here.dtype))
        return there.dtype == here.dtype or name in is_separate or (name not in changing and is_half_of_it)

    different = sorted(name for name in stored.keys() | targets.keys() if not fits(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"The checkpoint {str(folder.parent)!r} is of another model: {name!r} is {_described(stored.get(name))} in "
            f"it and {_described(targets.get(name))} in the model ({len(different)} names differ). Build the model "
            "that was saved, in the dtype that it was saved in."
        )
    rooms = {
        name: target if target.dtype == stored[name].dtype else target.room(stored[name].dtype)
        for name, target in targets.items()
        if name not in is_separate
    }
    return rooms, {name: targets[name] for name, room in rooms.items() if room is not targets[name]}


def _is_wider(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of the other has an equal in the one."""
    return one.is_floating_point and other.is_floating_point and torch.promote_types(one, other) == one


def _described(found: StoredTensor | Pieces | None) -> str:
    return "none" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"


def _read_plain(
    directory: Path, about: dict[str, Any], ranks: dist.ProcessGroup | None, scheduler: Any
) -> tuple[Any, Any]:
    """The schedule's state, and what this rank, or the first, gave as ``own``."""
    rank = own_rank(ranks) if about["world_size"] == num_ranks(ranks) else 0
    has_schedule = SCHEDULE in about["parts"] or (directory / SCHEDULE).exists()
    if scheduler is not None and not has_schedule:
        raise CheckpointError(f"{str(directory)!r} was saved without a schedule. Pass scheduler=None to load it.")
    own = _read_values(directory, own_file_of(rank), about)
    return _read_values(directory, SCHEDULE, about) if has_schedule else None, own


def _read_values(directory: Path, name: str, about: dict[str, Any]) -> Any:
    check_part(directory, name, about)
    try:
        return torch.load(io.BytesIO(contents(directory / name)), weights_only=True, map_location="cpu")
    except Exception as error:  # damaged bytes raise almost anything
        raise CheckpointError(
            f"{str(directory / name)!r} cannot be read: {type(error).__name__}: {error}. Resume from another "
            "checkpoint."
        ) from error
