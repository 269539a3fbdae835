"""accelerate: calls that are right for an optimizer of each rank's own, and would part ranks that share one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from dist_optim.checkpoint.engine_view import is_ours, view_of
from dist_optim.errors import UnsupportedError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["guard_calls", "served_optimizers"]


def served_optimizers(accelerator: Accelerator) -> list[Any]:
    """Our optimizers among those that this accelerator knows, in accelerate's wrapper, in the order of ``prepare``."""
    return [one for one in accelerator._optimizers if is_ours(one)]


def guard_calls(accelerator: Accelerator) -> None:
    """From now on ``join_uneven_inputs`` and ``register_for_checkpointing`` of this accelerator refuse what is not
    served, on every rank that calls them. Calling it again changes nothing."""
    if "join_uneven_inputs" in vars(accelerator):
        return
    vars(accelerator).update(
        join_uneven_inputs=_without_uneven_steps(accelerator, accelerator.join_uneven_inputs),
        register_for_checkpointing=_without_optimizers(accelerator.register_for_checkpointing),
    )


def _without_uneven_steps(accelerator: Accelerator, original: Callable[..., Any]) -> Callable[..., Any]:
    def join_uneven_inputs(joinables: Sequence[Any], even_batches: bool | None = None) -> Any:
        is_even = accelerator.even_batches if even_batches is None else even_batches
        ours = served_optimizers(accelerator)
        if not is_even and accelerator.num_processes > 1 and ours:
            name = view_of(ours[0]).spec.name
            raise UnsupportedError(
                f"{name}: join_uneven_inputs lets ranks stop at different steps, and its state is divided over the "
                "ranks: a step needs all of them. Leave even_batches at True: accelerate's loaders then give every "
                "rank the same number of batches; or pass drop_last=True to the DataLoader."
            )
        return original(joinables, even_batches)

    join_uneven_inputs.__doc__ = original.__doc__
    return join_uneven_inputs


def _without_optimizers(original: Callable[..., None]) -> Callable[..., None]:
    def register_for_checkpointing(*objects: Any) -> None:
        for one in objects:
            if isinstance(one, Optimizer) and is_ours(one):
                raise UnsupportedError(
                    f"{view_of(one).spec.name} was given to register_for_checkpointing, which saves what the first "
                    "rank holds, and each rank holds its own part. Leave it out: accelerator.save_state and load_state "
                    "hold every optimizer that prepare returned."
                )
        original(*objects)

    register_for_checkpointing.__doc__ = original.__doc__
    return register_for_checkpointing
