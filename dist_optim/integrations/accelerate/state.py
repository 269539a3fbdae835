"""``accelerator.save_state`` and ``load_state`` with our optimizers in them.

accelerate asks an optimizer's ``state_dict`` on rank 0 alone (DDP), or takes a step with zero gradients to find out
what FSDP should have sharded. Both would lose most of a sharded state. So our optimizers are kept out of its hands, and
written beside its files, as logical tensors.

accelerate writes into the folder file by file. So the optimizer's part, without which nothing loads, goes first and
comes last: a job that is killed in between leaves no mixture of two states.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_optim.checkpoint import exported_weights, save_optimizer
from dist_optim.checkpoint.directory import attempt, opened
from dist_optim.checkpoint.optimizer_state import Incoming, install, look_into, optimizer_of, read_state
from dist_optim.integrations.accelerate.guards import served_optimizers
from dist_optim.ranks.meeting import meet

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["serve_state"]


def serve_state(accelerator: Accelerator) -> None:
    """From now on ``save_state`` and ``load_state`` of this accelerator serve our optimizers too.

    Calling it again changes nothing. Not for DeepSpeed, whose engine saves its optimizer itself.
    """
    if "save_state" in vars(accelerator):
        return
    vars(accelerator).update(
        save_state=_with_optimizers_saved(accelerator, accelerator.save_state),
        load_state=_with_optimizers_loaded(accelerator, accelerator.load_state),
    )


def _with_optimizers_saved(accelerator: Accelerator, original: Callable[..., str]) -> Callable[..., str]:
    def save_state(*args: Any, **options: Any) -> str:
        meet("save_state()")
        ours = served_optimizers(accelerator)
        given = args[0] if args else options.get("output_dir")
        if given is not None:
            is_first = accelerator.is_main_process
            attempt(lambda: _remove(given, len(ours)) if is_first else None, Path(given), None)
        with ExitStack() as stack:
            stack.enter_context(_left_out(accelerator, ours))
            for optimizer in ours:
                stack.enter_context(exported_weights(optimizer))
            folder = attempt(lambda: original(*args, **options), Path(given or "checkpoints"), None)
        for number, optimizer in enumerate(ours):
            save_optimizer(_folder(folder, number), optimizer)
        return folder

    save_state.__doc__ = original.__doc__
    return save_state


def _with_optimizers_loaded(accelerator: Accelerator, original: Callable[..., None]) -> Callable[..., None]:
    def load_state(*args: Any, **options: Any) -> None:
        meet("load_state()")
        ours = served_optimizers(accelerator)
        given = args[0] if args else options.get("input_dir")
        found: list[Incoming] = []

        def look(folder: str) -> None:
            found.extend(attempt(lambda: _look_into(folder, ours), Path(folder), None, is_reading=True))

        with _left_out(accelerator, ours), ExitStack() as stack:
            if given is not None:
                look(os.path.expanduser(given))
            else:  # accelerate chooses the folder itself: the latest one
                handle = accelerator.register_load_state_pre_hook(lambda models, folder: look(folder))
                stack.callback(handle.remove)
            attempt(lambda: original(*args, **options), Path(given or "checkpoints"), None, is_reading=True)
        for optimizer, incoming in zip(ours, found, strict=True):
            read_state(optimizer_of(optimizer), incoming)
            install(optimizer_of(optimizer), incoming)

    load_state.__doc__ = original.__doc__
    return load_state


@contextmanager
def _left_out(accelerator: Accelerator, ours: list[Any]) -> Iterator[None]:
    everything = list(accelerator._optimizers)
    accelerator._optimizers[:] = [one for one in everything if not any(one is own for own in ours)]
    try:
        yield
    finally:
        accelerator._optimizers[:] = everything


def _look_into(folder: str, ours: list[Any]) -> list[Incoming]:
    folders = [opened(_folder(folder, number)) for number in range(len(ours))]
    return [look_into(one, optimizer_of(optimizer)) for one, optimizer in zip(folders, ours, strict=True)]


def _remove(state: str, number: int) -> None:
    for folder in (_folder(state, at) for at in range(number)):
        if folder.exists():
            shutil.rmtree(folder)


def _folder(state: str, number: int) -> Path:
    return Path(state) / ("dist_optim" if number == 0 else f"dist_optim_{number}")
