"""``accelerator.save_state`` and ``load_state`` with our optimizers in them.

accelerate asks an optimizer's ``state_dict`` on rank 0 alone (DDP), or takes a step with zero gradients to find out
what FSDP should have sharded. Both would lose most of a sharded state. So our optimizers are kept out of its hands, and
written beside its files, as logical tensors. Weights that another strategy has saved are read here too; those of a
DeepSpeed engine are written here, where accelerate would let the engine save all in DeepSpeed's own format.

accelerate writes into the folder file by file. So the record that binds them (``checkpoint.folder_seal``), without
which nothing loads, goes first and comes last: a job that is killed in between leaves no mixture of two states.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dist_optim.building.arguments import listed_names
from dist_optim.checkpoint import exported_weights, save_optimizer, wait_for_saves
from dist_optim.checkpoint.beside_training import write_beside
from dist_optim.checkpoint.build_values import RATE, let_follow
from dist_optim.checkpoint.directory import attempt, opened, removed_in_failure
from dist_optim.checkpoint.engine_view import is_ours, view_of
from dist_optim.checkpoint.folder_seal import MARK, check_folder, parts_among, seal_folder
from dist_optim.checkpoint.loss_scale import SCALER_FILE, go_on_with_engines, of_file
from dist_optim.checkpoint.model_weights import (
    FSDP_FOLDER,
    OWN_FOLDER,
    StoredWeights,
    copied_weights,
    find_weights,
    load_weights,
    remove_weights,
    save_weights,
)
from dist_optim.checkpoint.optimizer_state import Incoming, copied_optimizer, install, look_into, read_state
from dist_optim.checkpoint.plain_loads import plain_loads
from dist_optim.errors import CheckpointError
from dist_optim.integrations.accelerate.guards import served_optimizers
from dist_optim.integrations.accelerate.rotating import nothing_removed, remove_older
from dist_optim.ranks.agreement import assert_ranks_equal
from dist_optim.ranks.meeting import meet

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["serve_state"]

Write = Callable[[dist.ProcessGroup | None], None]

SCHEDULE, ENGINES_OWN = "scheduler.bin", "pytorch_model"
"""accelerate's name of the first schedule; and its folder of what DeepSpeed's engine saves itself."""


def serve_state(accelerator: Accelerator) -> None:
    """From now on ``save_state`` and ``load_state`` of this accelerator serve our optimizers too.

    Calling it again changes nothing.
    """
    if "save_state" in vars(accelerator):
        return
    vars(accelerator).update(
        save_state=_with_optimizers_saved(accelerator, accelerator.save_state),
        load_state=_with_optimizers_loaded(accelerator, accelerator.load_state),
    )


def _with_optimizers_saved(accelerator: Accelerator, original: Callable[..., str]) -> Callable[..., str]:
    def save_state(*args: Any, asynchronous: bool = False, **options: Any) -> str:
        meet("save_state()")
        wait_for_saves()
        ours, is_first = served_optimizers(accelerator), accelerator.is_main_process
        _check_asynchronous(asynchronous, ours)
        target = _target(accelerator, args[0] if args else options.get("output_dir"))
        is_numbered = accelerator.project_configuration.automatic_checkpoint_naming  # one that is there is refused
        is_new = attempt(lambda: not target.exists(), target, None)
        if not is_new and not is_numbered:
            attempt(lambda: _take_apart(target, len(ours)) if is_first else None, target, None)
        with removed_in_failure(target, is_new and is_first), nothing_removed(accelerator) as limit:
            folder, writes = _write_theirs(accelerator, ours, target, lambda: original(*args, **options), asynchronous)

        def write_ours(ranks: dist.ProcessGroup | None) -> None:
            with removed_in_failure(target, is_new and is_first):
                for write in writes:
                    write(ranks)
                seal_folder(Path(folder), ranks)
            attempt(lambda: remove_older(Path(folder), limit) if is_first else None, target, ranks)

        if asynchronous:
            write_beside(write_ours, target, view_of(ours[0]).ranks)
        else:
            write_ours(None)
        return folder

    save_state.__doc__ = original.__doc__
    return save_state


def _check_asynchronous(asynchronous: bool, ours: list[Any]) -> None:
    """Collective.

    Raises:
        RanksDisagreeError, CheckpointError: On all ranks: they say different, or nothing of ours is saved.
    """
    assert_ranks_equal("save_state()", [("asynchronous", asynchronous)], "Give the same on every rank.", None)
    if asynchronous and not ours:
        raise CheckpointError(
            "save_state(asynchronous=True): no optimizer of dist_optim is in this accelerator, and accelerate "
            "writes its own files before it returns. Leave it out, or prepare the optimizer with dist_optim."
        )


def _write_theirs(
    accelerator: Accelerator, ours: list[Any], target: Path, original: Callable[[], str], is_copied: bool
) -> tuple[str, list[Write]]:
    """Write accelerate's files; where they are, and what is left to do but for the record over all. Collective."""
    is_first = accelerator.is_main_process
    writes: list[Write] = []
    with ExitStack() as stack:
        stack.enter_context(_left_out(accelerator, ours))
        for optimizer in ours:
            stack.enter_context(exported_weights(optimizer))
            if engine := engine_of(accelerator):
                stack.enter_context(_weights_alone(engine, optimizer, writes if is_copied else None))
        folder = attempt(original, target, None)
    if (schedule := schedule_inside(accelerator)) is not None:
        path = Path(folder) / SCHEDULE
        attempt(lambda: torch.save(schedule.state_dict(), path) if is_first else None, path, None)
    for number, optimizer in enumerate(ours):
        at = _folder(folder, number)
        if is_copied:
            writes.append(copied_optimizer(at, optimizer))
        else:
            save_optimizer(at, optimizer)
    return folder, writes


def _with_optimizers_loaded(accelerator: Accelerator, original: Callable[..., None]) -> Callable[..., None]:
    def load_state(input_dir: str | None = None, *args: Any, allow_changed: Iterable[str] = (), **options: Any) -> None:
        meet("load_state()")
        wait_for_saves()
        named = Path(input_dir or "checkpoints")
        folder = attempt(lambda: _chosen(accelerator, input_dir), named, None, is_reading=True)
        ours = served_optimizers(accelerator)
        parts, hyperparameters = parts_among(listed_names("allow_changed", allow_changed))
        if ours:
            check_folder(folder, allowed=parts)
        if engine_of(accelerator) and (folder / ENGINES_OWN).is_dir():
            with plain_loads():
                original(str(folder), *args, **options)
            return
        look = functools.partial(_look_into, str(folder), ours, hyperparameters)
        found = attempt(look, folder, None, is_reading=True)
        for optimizer, incoming in zip(ours, found, strict=True):
            read_state(view_of(optimizer), incoming)

        def load() -> None:
            with plain_loads():
                original(str(folder), *args, **options)

        weights = attempt(lambda: _foreign_weights(accelerator, folder), folder, None, is_reading=True)
        with _left_out(accelerator, ours, leaves_models=weights is not None), _scaler_left_out(accelerator, folder):
            attempt(load, folder, None, is_reading=True)
        if weights is not None:
            (model,) = accelerator._models
            load_weights(weights, model, ours[0] if engine_of(accelerator) else None)
        for optimizer, incoming in zip(ours, found, strict=True):
            install(view_of(optimizer), incoming)
        if (schedule := schedule_inside(accelerator)) is not None:
            path = folder / SCHEDULE
            attempt(lambda: _load_schedule(schedule, path), path, None, is_reading=True)
        attempt(lambda: _go_on_with_scale(accelerator, ours, folder), folder, None, is_reading=True)
        if any(RATE in incoming.changed for incoming in found):
            attempt(lambda: _let_schedules_follow(accelerator), folder, None, is_reading=True)

    load_state.__doc__ = original.__doc__
    return load_state


def engine_of(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine; None under other strategies."""
    return accelerator._models[0] if accelerator.distributed_type.value == "DEEPSPEED" else None


def schedule_inside(accelerator: Accelerator) -> Any:
    """The schedule that DeepSpeed's configuration names and its engine steps: accelerate leaves it to the engine."""
    engine = engine_of(accelerator)
    has_wrapper = any(type(one).__name__ == "DeepSpeedSchedulerWrapper" for one in accelerator._schedulers)
    return engine.lr_scheduler if engine is not None and has_wrapper else None


def _load_schedule(schedule: Any, path: Path) -> None:
    schedule.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _let_schedules_follow(accelerator: Accelerator) -> None:
    """They have been loaded with the rates that they were saved with."""
    for schedule in accelerator._schedulers:
        for optimizer in getattr(schedule, "optimizers", ()):
            if is_ours(optimizer):
                let_follow(schedule, view_of(optimizer).optimizer.param_groups)


def _target(accelerator: Accelerator, given: Any) -> Path:
    """The folder that is going to be written."""
    if accelerator.project_configuration.automatic_checkpoint_naming:
        return Path(accelerator.project_dir) / "checkpoints" / f"checkpoint_{accelerator.save_iteration}"
    return Path(given or "checkpoints")


def _chosen(accelerator: Accelerator, given: str | None) -> Path:
    """The folder to load: the latest one that was saved to its end, where accelerate names them itself."""
    if given is not None:
        return Path(os.path.expanduser(given))
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        raise CheckpointError("load_state() was given no folder. Give the one that save_state returned.")
    folders = [path for path in (Path(accelerator.project_dir) / "checkpoints").iterdir() if path.name[-1].isdigit()]
    whole = [path for path in folders if (path / MARK).is_file()]
    return max(whole or folders, key=lambda path: int(path.name.rpartition("_")[2]))


def _foreign_weights(accelerator: Accelerator, folder: Path) -> StoredWeights | None:
    """Weights that accelerate itself does not read under this strategy; None where it does, or there are none.

    Raises:
        CheckpointError: There are several models, and nobody knows whose they are.
    """
    weights = None if _is_native(accelerator, folder) else find_weights(folder)
    if weights is not None and len(accelerator._models) > 1:
        raise CheckpointError(
            f"{str(folder)!r} was saved under another strategy, and this accelerator has {len(accelerator._models)} "
            "models: states of several load under the strategy that saved them. Resume under that one; nothing was "
            "changed."
        )
    return weights


def _is_native(accelerator: Accelerator, folder: Path) -> bool:
    """Whether the weights lie there as accelerate itself saves them under this strategy."""
    if (folder / OWN_FOLDER).is_dir() or engine_of(accelerator):
        return False
    if accelerator.distributed_type.value == "FSDP":
        is_in_pieces = "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
        return (folder / FSDP_FOLDER).is_dir() if is_in_pieces else (folder / "pytorch_model_fsdp.bin").is_file()
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


@contextmanager
def _weights_alone(engine: Any, optimizer: Any, later: list[Write] | None) -> Iterator[None]:
    """While accelerate lets the engine save everything its own way, it saves weights that every strategy reads.

    Where there is a list for what is written later, a copy is.
    """

    def save_checkpoint(folder: str, *args: Any, **options: Any) -> None:
        if later is None:
            save_weights(Path(folder), engine, optimizer)
        else:
            later.append(copied_weights(Path(folder), engine, optimizer))

    before = engine.save_checkpoint
    engine.save_checkpoint = save_checkpoint
    try:
        yield
    finally:
        engine.save_checkpoint = before


@contextmanager
def _left_out(accelerator: Accelerator, ours: list[Any], *, leaves_models: bool = False) -> Iterator[None]:
    optimizers, models = list(accelerator._optimizers), list(accelerator._models)
    accelerator._optimizers[:] = [one for one in optimizers if not any(one is own for own in ours)]
    if leaves_models:
        accelerator._models[:] = []
    try:
        yield
    finally:
        accelerator._optimizers[:], accelerator._models[:] = optimizers, models


@contextmanager
def _scaler_left_out(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Where no ``GradScaler`` was saved, accelerate would look for one, with the weights already loaded."""
    scaler = accelerator.scaler
    accelerator.scaler = scaler if (folder / SCALER_FILE).is_file() else None
    try:
        yield
    finally:
        accelerator.scaler = scaler


def _go_on_with_scale(accelerator: Accelerator, ours: list[Any], folder: Path) -> None:
    """Of fp16 losses, from ZeRO's engine to a ``GradScaler``, and back."""
    if not ours:
        return
    if engine_of(accelerator) and (found := of_file(folder / SCALER_FILE)) is not None:
        view_of(ours[0]).take_loss_scale(found)
    elif accelerator.scaler is not None and not (folder / SCALER_FILE).is_file():
        go_on_with_engines(accelerator.scaler, Path(_folder(folder, 0)))


def _look_into(folder: str, ours: list[Any], allow_changed: Iterable[str]) -> list[Incoming]:
    folders = [opened(_folder(folder, number)) for number in range(len(ours))]
    pairs = zip(folders, ours, strict=True)
    return [look_into(one, view_of(optimizer), allow_changed) for one, optimizer in pairs]


def _take_apart(state: Path, number: int) -> None:
    """Remove from the folder what makes it loadable, the record first."""
    (state / MARK).unlink(missing_ok=True)
    for folder in (_folder(state, at) for at in range(number)):
        if folder.exists():
            shutil.rmtree(folder)
    remove_weights(state)


def _folder(state: str | Path, number: int) -> Path:
    return Path(state) / ("dist_optim" if number == 0 else f"dist_optim_{number}")
