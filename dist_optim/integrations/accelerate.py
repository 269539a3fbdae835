"""accelerate: place the model, then build the optimizer on what will really be trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_optim.agreement import raise_together
from dist_optim.build import build_optimizer, resolve
from dist_optim.errors import DistOptimError, MissingPackageError, UnsupportedError
from dist_optim.integrations import cpu_rehearsal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

__all__ = ["prepare"]

SERVED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "FSDP")


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: str | type[Optimizer],
    *,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    **options: Any,
) -> tuple[nn.Module, AcceleratedOptimizer, AcceleratedScheduler | None]:
    """Wrap the model by accelerate's strategy, build the optimizer on it, and a schedule on the optimizer.

    Strategies: one process, DDP, FSDP 1 (with original parameters), FSDP 2, and FSDP 2 on a replicate x shard mesh. On
    the CPU, FSDP asked for is FSDP done: see ``dist_optim.integrations.cpu_rehearsal``.

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
        UnsupportedError: The strategy, or a setting of it, is not served yet.
        DistOptimError: Whatever ``build_optimizer`` refuses.
    """
    try:
        from accelerate.scheduler import AcceleratedScheduler
    except ImportError as error:
        raise MissingPackageError(
            f"dist_optim.integrations.accelerate needs accelerate ({error}). Install it with: "
            "pip install 'dist-optim[train]'"
        ) from error

    raise_together(_why_refused(accelerator, optimizer))
    placed = _place(accelerator, model)
    built = build_optimizer(placed, optimizer, **options)
    prepared = accelerator.prepare_optimizer(built)
    if scheduler is None:
        return placed, prepared, None
    # split_batches=True is accelerate's word for "one step a call": its default steps num_processes times.
    wrapped = AcceleratedScheduler(scheduler(built), [prepared], step_with_optimizer=True, split_batches=True)
    accelerator._schedulers.append(wrapped)
    return placed, prepared, wrapped


def _place(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model, wrapped and on its device."""
    if not accelerator.is_fsdp2 or getattr(model, "_is_accelerate_prepared", False):
        placed = accelerator.prepare_model(model)
    else:
        # FSDP2 is only prepared together with an optimizer, whose parameters accelerate then exchanges. It gets one
        # that nobody will step.
        placeholder = torch.optim.SGD([next(model.parameters())], lr=0.0)
        placed, wrapped_placeholder = accelerator.prepare(model, placeholder)
        accelerator._optimizers.remove(wrapped_placeholder)
    if accelerator.distributed_type.value == "FSDP":
        cpu_rehearsal.assert_fsdp(placed)
    return placed


def _why_refused(accelerator: Accelerator, optimizer: str | type[Optimizer]) -> DistOptimError | None:
    """The first thing that this rank cannot serve; turns the CPU rehearsal on where it is due."""
    try:
        resolve(optimizer)
        if cpu_rehearsal.is_ignored(accelerator):
            cpu_rehearsal.turn_fsdp_on(accelerator)
        _refuse_unserved(accelerator)
    except DistOptimError as error:
        return error
    return None


def _refuse_unserved(accelerator: Accelerator) -> None:
    strategy = accelerator.distributed_type.value
    if strategy not in SERVED:
        raise UnsupportedError(
            f"accelerate's strategy {strategy} is not served yet. Use one process, DDP (--multi_gpu) or FSDP "
            "(--use_fsdp --fsdp_version 2)."
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes"):
        # On the CPU accelerate silently trains DDP, or one process, in its place.
        raise UnsupportedError(
            f"DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED is set), but accelerate runs {strategy} here. Remove "
            "DeepSpeed from the accelerate configuration, or run where accelerate supports it."
        )
    if strategy == "FSDP":
        _refuse_fsdp_settings(accelerator)


def _refuse_fsdp_settings(accelerator: Accelerator) -> None:
    plugin, parallelism = accelerator.state.fsdp_plugin, accelerator.parallelism_config
    if plugin.fsdp_version == 1 and not plugin.use_orig_params:
        raise UnsupportedError(
            "FSDP1 with use_orig_params=False hides the parameters that the optimizer needs to know. Set "
            "fsdp_use_orig_params: true in the accelerate configuration, or use FSDP2 (fsdp_version: 2)."
        )
    offloads = getattr(plugin.cpu_offload, "offload_params", type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy")
    if offloads:
        raise UnsupportedError(
            "FSDP with parameters offloaded to the CPU has not been shown to keep the trajectory. Set "
            "fsdp_offload_params: false; the optimizer's state is sharded already."
        )
    for name in ("tp", "cp", "sp"):
        size = getattr(parallelism, f"{name}_size", 1)
        if size > 1:
            raise UnsupportedError(
                f"accelerate's parallelism_config asks for {name}_size={size}. Parameters may be sharded over one mesh "
                "axis, and replicated over another: set dp_shard_size and dp_replicate_size alone."
            )
