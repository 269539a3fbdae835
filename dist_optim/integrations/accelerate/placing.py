"""accelerate: place the model, then build the optimizer on what will really be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_optim.building.build import build_optimizer
from dist_optim.building.choice import resolve
from dist_optim.errors import MissingPackageError, UnsupportedError
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate.deepspeed import prepare_engine, refuse_missed_ranks
from dist_optim.integrations.accelerate.schedules import (
    ScheduleChoice,
    attach_schedule,
    refuse_stray_options,
    schedule_of_engine,
)
from dist_optim.integrations.accelerate.state import serve_state
from dist_optim.integrations.environment import is_switched_on
from dist_optim.overrides import check
from dist_optim.ranks.together import together

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

__all__ = ["place_by_fsdp2", "prepare", "refuse_unserved_strategy"]

SERVED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "FSDP", "DEEPSPEED")


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: str | type[Optimizer],
    *,
    scheduler: ScheduleChoice | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, AcceleratedOptimizer, Any]:
    """Wrap the model by accelerate's strategy, build the optimizer on it, and a schedule on the optimizer.

    Strategies: one process, DDP, FSDP 1 (with original parameters), FSDP 2, FSDP 2 on a replicate x shard mesh, and
    DeepSpeed's ZeRO 0 to 3. On the CPU, FSDP or DeepSpeed asked for is what is done, or it is refused: see
    ``dist_optim.integrations.cpu_rehearsal``.

    Collective: every process calls it with the same arguments. Data loaders go through ``accelerator.prepare`` as
    usual; the optimizer must not. The returned optimizer and scheduler obey ``accelerator.accumulate``: between
    synchronised steps their ``step()`` does nothing. The scheduler steps once a call, whatever the number of processes.
    ``accelerator.save_state`` and ``load_state`` hold the optimizer too, under any sharding and number of processes.

    Args:
        accelerator: Not yet given this model.
        model: The plain model.
        optimizer: A registered name or an optimizer class.
        scheduler: The learning-rate schedule: a name or a class, or a function that makes one of an optimizer; None for
            a constant rate. One that follows a metric is not wrapped: call its ``step(metric)`` after evaluating.
        scheduler_options: Keywords of ``dist_optim.build_scheduler`` for a name or a class.
        **options: Everything that ``dist_optim.build_optimizer`` takes: ``lr``, ``target_modules``, ``rank``, ...

    Returns:
        The prepared model, the optimizer (``optimizer.optimizer`` is the ``DistributedOptimizer``; under DeepSpeed,
        DeepSpeed's wrapper), and the scheduler (None where neither the call nor DeepSpeed's JSON asks for one).

    Raises:
        UnsupportedError: The strategy, or a setting of it, is not served yet.
        DistOptimError: Whatever ``build_optimizer`` refuses.
    """
    try:
        import accelerate  # noqa: F401  the caller has one
    except ImportError as error:
        raise MissingPackageError(
            f"dist_optim.integrations.accelerate needs accelerate ({error}). Install it with: "
            "pip install 'dist-optim[train]'"
        ) from error

    def check() -> None:
        _refuse(accelerator, optimizer)
        refuse_stray_options(scheduler, scheduler_options)

    together(check, doing="Preparing the model", remedy="Check the arguments of prepare.")
    built: Optimizer
    if accelerator.distributed_type.value == "DEEPSPEED":
        placed, prepared, engine_schedule, built = prepare_engine(
            accelerator, model, optimizer, scheduler is not None, options
        )
        if scheduler is None:
            return placed, prepared, schedule_of_engine(engine_schedule)
    else:
        placed = _place(accelerator, model)
        built = build_optimizer(placed, optimizer, **options)
        if built.inside_backward is not None:
            _refuse_stored_gradients(accelerator, built.spec.name)
        prepared = accelerator.prepare_optimizer(built)
        serve_state(accelerator, prepared)
        if scheduler is None:
            return placed, prepared, None
    return placed, prepared, attach_schedule(accelerator, built, prepared, scheduler, scheduler_options)


def _place(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model, wrapped and on its device."""
    if not accelerator.is_fsdp2 or getattr(model, "_is_accelerate_prepared", False):
        placed = accelerator.prepare_model(model)
    else:
        placed = place_by_fsdp2(accelerator, model)
    if accelerator.distributed_type.value == "FSDP":
        cpu_rehearsal.assert_fsdp(placed)
    return placed


def place_by_fsdp2(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model before there is an optimizer. Collective.

    accelerate places one by FSDP2 only together with an optimizer, whose parameters it exchanges. It gets one that
    nobody will step.
    """
    placeholder = torch.optim.SGD([next(model.parameters())], lr=0.0)
    placed, wrapped_placeholder = accelerator.prepare(model, placeholder)
    accelerator._optimizers.remove(wrapped_placeholder)
    return placed


def _refuse(accelerator: Accelerator, optimizer: str | type[Optimizer]) -> None:
    """What this rank cannot serve; turns the CPU rehearsal on where it is due."""
    check("accelerate")
    resolve(optimizer, inside_backward=accelerator.distributed_type.value != "DEEPSPEED")
    if cpu_rehearsal.is_ignored(accelerator):
        cpu_rehearsal.turn_fsdp_on(accelerator)
    refuse_unserved_strategy(accelerator)


def _refuse_stored_gradients(accelerator: Accelerator, name: str) -> None:
    """What needs gradients to last until ``step``, and they are applied inside backward. The same on all ranks."""
    unserved = ""
    if accelerator.gradient_accumulation_steps > 1:
        unserved = f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps} sums gradients over batches"
    elif accelerator.scaler is not None:
        unserved = "mixed_precision='fp16' scales gradients until step()"
    if unserved:
        raise UnsupportedError(
            f"{name}: {unserved}, but here each is applied inside backward and freed. Use larger batches with "
            "gradient_accumulation_steps=1, and bf16; or pass fused_backward=False, which stores gradients."
        )


def refuse_unserved_strategy(accelerator: Accelerator) -> None:
    """Refuse a strategy, or a setting of it, that is not served; on this rank alone.

    Raises:
        UnsupportedError: With what to use instead.
    """
    strategy = accelerator.distributed_type.value
    if strategy not in SERVED:
        raise UnsupportedError(
            f"accelerate's strategy {strategy} is not served yet. Use one process, DDP (--multi_gpu), FSDP "
            "(--use_fsdp --fsdp_version 2) or DeepSpeed (--use_deepspeed)."
        )
    if strategy == "DEEPSPEED":
        refuse_missed_ranks(accelerator)
    elif is_switched_on("ACCELERATE_USE_DEEPSPEED"):
        # Told to use the CPU, accelerate silently trains DDP, or one process, in its place.
        raise UnsupportedError(
            f"DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED is set), but accelerate runs {strategy} here. Rehearse "
            "on the CPU with Accelerator(**dist_optim.integrations.cpu_rehearsal.deepspeed_arguments(), ...), without "
            "cpu=True; or remove DeepSpeed from the accelerate configuration."
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
    if plugin.fsdp_version == 1 and plugin.cpu_offload.offload_params:
        raise UnsupportedError(
            "FSDP1 with parameters offloaded to the CPU has not been shown to keep the trajectory. Use FSDP2 "
            "(fsdp_version: 2), or set fsdp_offload_params: false; the optimizer's state is sharded already."
        )
    for name in ("tp", "cp", "sp"):
        size = getattr(parallelism, f"{name}_size", 1)
        if size > 1:
            raise UnsupportedError(
                f"accelerate's parallelism_config asks for {name}_size={size}. Parameters may be sharded over one mesh "
                "axis, and replicated over another: set dp_shard_size and dp_replicate_size alone."
            )
