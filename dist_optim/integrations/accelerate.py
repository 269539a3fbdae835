"""accelerate: place the model, then build the optimizer on what will really be trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_optim.agreement import raise_together
from dist_optim.build import build_optimizer
from dist_optim.errors import MissingPackageError, UnsupportedError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

__all__ = ["prepare"]


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: str | type[Optimizer],
    *,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    **options: Any,
) -> tuple[nn.Module, AcceleratedOptimizer, AcceleratedScheduler | None]:
    """Wrap the model by accelerate's strategy, build the optimizer on it, and a schedule on the optimizer.

    Collective: every process calls it with the same arguments. Data loaders go through ``accelerator.prepare`` as
    usual; the optimizer must not. The returned optimizer and scheduler obey ``accelerator.accumulate``: between
    synchronised steps their ``step()`` does nothing. The scheduler steps once a call, whatever the number of processes.

    Args:
        accelerator: Not yet given this model.
        model: The plain model.
        optimizer: A registered name or an optimizer class.
        scheduler: Makes the learning-rate schedule of an optimizer; None for a constant rate.
        **options: Everything that ``dist_optim.build_optimizer`` takes: ``lr``, ``target_modules``, ``rank``, ...

    Returns:
        The prepared model, the optimizer (``optimizer.optimizer`` is the ``DistributedOptimizer``), and the scheduler
        (None where none was asked for).

    Raises:
        UnsupportedError: The strategy is not served yet, or accelerate ignores the one that was asked for.
        DistOptimError: Whatever ``build_optimizer`` refuses.
    """
    try:
        from accelerate.scheduler import AcceleratedScheduler
    except ImportError as error:
        raise MissingPackageError(
            f"dist_optim.integrations.accelerate needs accelerate ({error}). Install it with: "
            "pip install 'dist-optim[train]'"
        ) from error

    raise_together(_refuse_unserved(accelerator))
    placed = accelerator.prepare_model(model)
    built = build_optimizer(placed, optimizer, **options)
    prepared = accelerator.prepare_optimizer(built)
    if scheduler is None:
        return placed, prepared, None
    # split_batches=True is accelerate's word for "one step a call": its default steps num_processes times.
    wrapped = AcceleratedScheduler(scheduler(built), [prepared], step_with_optimizer=True, split_batches=True)
    accelerator._schedulers.append(wrapped)
    return placed, prepared, wrapped


def _refuse_unserved(accelerator: Accelerator) -> UnsupportedError | None:
    served = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
    strategy = accelerator.distributed_type
    if strategy.value not in served:
        return UnsupportedError(
            f"accelerate's strategy {strategy.value} is not served yet. Use one process or DDP (--multi_gpu), or build "
            "the optimizer on a fully_shard model with dist_optim.build_optimizer."
        )
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            # On CPU accelerate silently trains DDP, or one process, in place of what was asked for.
            return UnsupportedError(
                f"{name} was asked for ({variable} is set), but accelerate runs {strategy.value} here. "
                f"Remove {name} from the accelerate configuration, or run where accelerate supports it."
            )
    return None
