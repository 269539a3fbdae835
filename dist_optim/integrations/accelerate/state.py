"""``accelerator.save_state`` and ``load_state`` with our optimizers in them.

accelerate asks an optimizer's ``state_dict`` on rank 0 alone (DDP), or takes a step with zero gradients to find out
what FSDP should have sharded. Both would lose most of a sharded state. So our optimizers are kept out of its hands, and
written beside its files, as logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_optim.checkpoint import exported_weights, load_optimizer, save_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["serve_state"]


def serve_state(accelerator: Accelerator, prepared: Any) -> None:
    """From now on ``accelerator.save_state`` and ``load_state`` serve this optimizer too, on this accelerator alone.

    Not for DeepSpeed, whose engine saves its optimizer itself.
    """
    ours: list[Any] | None = vars(accelerator).get("_dist_optim_optimizers")
    if ours is None:
        ours = []
        vars(accelerator).update(
            _dist_optim_optimizers=ours,
            save_state=_with_optimizers_saved(accelerator, accelerator.save_state, ours),
            load_state=_with_optimizers_loaded(accelerator, accelerator.load_state, ours),
        )
    ours.append(prepared)


def _with_optimizers_saved(
    accelerator: Accelerator, original: Callable[..., str], ours: list[Any]
) -> Callable[..., str]:
    def save_state(*args: Any, **options: Any) -> str:
        with ExitStack() as stack:
            stack.enter_context(_left_out(accelerator, ours))
            for optimizer in ours:
                stack.enter_context(exported_weights(optimizer))
            folder = original(*args, **options)
        for number, optimizer in enumerate(ours):
            save_optimizer(_folder(folder, number), optimizer)
        return folder

    save_state.__doc__ = original.__doc__
    return save_state


def _with_optimizers_loaded(
    accelerator: Accelerator, original: Callable[..., None], ours: list[Any]
) -> Callable[..., None]:
    def load_state(*args: Any, **options: Any) -> None:
        folders: list[str] = []
        # accelerate may choose the folder itself: the latest one.
        handle = accelerator.register_load_state_pre_hook(lambda models, folder: folders.append(folder))
        try:
            with _left_out(accelerator, ours):
                original(*args, **options)
        finally:
            handle.remove()
        for number, optimizer in enumerate(ours):
            load_optimizer(_folder(folders[0], number), optimizer)

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


def _folder(state: str, number: int) -> Path:
    return Path(state) / ("dist_optim" if number == 0 else f"dist_optim_{number}")
