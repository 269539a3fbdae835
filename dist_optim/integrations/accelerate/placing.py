"""accelerate: place the model, then build the optimizer on what will really be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_optim.building.alike import assert_alike
from dist_optim.building.arguments import check_model
from dist_optim.building.build import build_optimizer
from dist_optim.building.choice import resolve
from dist_optim.errors import MissingPackageError, ParameterError, UnsupportedError
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate import tensor_parallel
from dist_optim.integrations.accelerate.deepspeed import prepare_engine, refuse_missed_ranks
from dist_optim.integrations.accelerate.following import followed, names_before, remember
from dist_optim.integrations.accelerate.guards import guard_calls
from dist_optim.integrations.accelerate.schedules import (
    ScheduleChoice,
    attach_schedule,
    refuse_schedule,
    schedule_of_engine,
)
from dist_optim.integrations.accelerate.state import serve_state
from dist_optim.integrations.environment import is_switched_on, refuse_separate_ranks
from dist_optim.overrides import check
from dist_optim.ranks.first_meeting import meet_first
from dist_optim.ranks.together import together
from dist_optim.specs.registry import OptimizerSpec

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

__all__ = ["place_by_fsdp2", "prepare", "refuse_fsdp_settings", "refuse_stored_gradients", "refuse_unserved_strategy"]

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

    Strategies: one process, DDP, FSDP 1 (with original parameters), FSDP 2, also on a replicate x shard mesh, tensor
    parallelism (``tp_size``: the model comes with it applied) alone or with FSDP 2 over it, and DeepSpeed's ZeRO 0 to
    3. On the CPU, what is asked for is what is done, or it is refused: see ``dist_optim.integrations.cpu_rehearsal``.

    Collective: every process calls it with the same arguments. Data loaders go through ``accelerator.prepare`` as
    usual; the optimizer must not: give its name or class, which is built when the model is in place. The returned
    optimizer and scheduler obey ``accelerator.accumulate``: between synchronised steps their ``step()`` does nothing.
    The scheduler steps once a call, whatever the number of processes. ``accelerator.save_state`` and ``load_state``
    hold the optimizer too, under any sharding and number of processes.

    Args:
        accelerator: Not yet given this model.
        model: The plain model.
        optimizer: A registered name or an optimizer class.
        scheduler: The learning-rate schedule: a name or a class, or a function that makes one of an optimizer; None for
            a constant rate. One that follows a metric is not wrapped: call its ``step(metric)`` after evaluating.
        scheduler_options: Keywords of ``dist_optim.build_scheduler`` for a name or a class.
        **options: Everything that ``dist_optim.build_optimizer`` takes: ``lr``, ``target_modules``, ``rank``, ...
            Groups in ``params`` may hold the plain model's parameters: they are followed by name where the strategy
            puts others in their place, also for a second optimizer on the model that the first call returned.

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

    meet_first("prepare()")

    def check() -> OptimizerSpec:
        _refuse_arguments(accelerator, model)
        refuse_schedule(scheduler, scheduler_options)
        spec = _refuse(accelerator, optimizer)
        tensor_parallel.refuse_unserved(accelerator, model)
        return spec

    spec = together(check, doing="Preparing the model", remedy="Check the arguments of prepare.")
    asked = {"scheduler": scheduler, "scheduler_options": scheduler_options, **options, "params": None}
    assert_alike({"optimizer": spec.name, **asked}, options.get("process_group"), [spec.package])
    built: Optimizer
    if accelerator.distributed_type.value == "DEEPSPEED":
        placed, prepared, engine_schedule, built = prepare_engine(
            accelerator, model, optimizer, scheduler is not None, options
        )
        serve_state(accelerator)
        guard_calls(accelerator)
        if scheduler is None:
            return placed, prepared, schedule_of_engine(engine_schedule)
    else:
        names = names_before(model)
        placed = _place(accelerator, model)
        remember(names, placed)
        built = build_optimizer(placed, optimizer, **{**options, "params": followed(options.get("params"))})
        if built.inside_backward is not None:
            refuse_stored_gradients(accelerator, built.spec.name)
        prepared = accelerator.prepare_optimizer(built)
        serve_state(accelerator)
        guard_calls(accelerator)
        if scheduler is None:
            return placed, prepared, None
    return placed, prepared, attach_schedule(accelerator, built, prepared, scheduler, scheduler_options)


def _place(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model, wrapped and on its device."""
    with tensor_parallel.left_as_it_is(accelerator):
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


def _refuse_arguments(accelerator: Any, model: Any) -> None:
    from accelerate import Accelerator

    if not isinstance(accelerator, Accelerator):
        raise ParameterError(
            f"prepare takes accelerate's Accelerator first, and was given {accelerator!r:.80}. Call "
            "prepare(accelerator, model, name, lr=...): data loaders go to accelerator.prepare, apart from this."
        )
    check_model(model, "prepare(accelerator, ")
    is_placed = getattr(model, "_is_accelerate_prepared", False)
    if not is_placed and any(model is part for held in accelerator._models for part in held.modules()):
        raise ParameterError(
            "This model was prepared before, and is inside the one that prepare returned. For a second optimizer on "
            "it, pass the returned one."
        )


def _refuse(accelerator: Accelerator, optimizer: str | type[Optimizer]) -> OptimizerSpec:
    """The spec; what this rank cannot serve is refused. Turns the CPU rehearsal on where it is due."""
    check("accelerate")
    if accelerator.distributed_type.value != "DEEPSPEED":  # which has a remedy of its own
        refuse_separate_ranks(accelerator.num_processes)
    spec = resolve(optimizer, inside_backward=accelerator.distributed_type.value != "DEEPSPEED")
    if cpu_rehearsal.is_ignored(accelerator):
        cpu_rehearsal.turn_fsdp_on(accelerator)
    elif cpu_rehearsal.is_mesh_set_aside(accelerator):
        cpu_rehearsal.bring_mesh(accelerator)
    refuse_unserved_strategy(accelerator)
    return spec


def refuse_stored_gradients(accelerator: Accelerator, name: str) -> None:
    """What needs gradients to last until ``step``, and they are applied inside backward. The same on all ranks.

    Raises:
        UnsupportedError: With what to use instead.
    """
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
        refuse_fsdp_settings(accelerator.state.fsdp_plugin, accelerator.parallelism_config)


def refuse_fsdp_settings(plugin: Any, parallelism: Any) -> None:
    """Refuse settings of FSDP, and a mesh beside it, that are not served.

    Args:
        plugin: accelerate's ``FullyShardedDataParallelPlugin``, or what has its attributes.
        parallelism: accelerate's ``ParallelismConfig``; None for no mesh.

    Raises:
        UnsupportedError: With what to use instead.
    """
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
    for name in ("cp", "sp"):
        size = getattr(parallelism, f"{name}_size", 1)
        if size > 1:
            raise UnsupportedError(
                f"accelerate's parallelism_config asks for {name}_size={size}, which cuts the batch along the "
                "sequence. Set dp_replicate_size, dp_shard_size and tp_size alone."
            )
