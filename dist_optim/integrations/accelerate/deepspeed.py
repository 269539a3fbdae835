"""accelerate's DeepSpeed: one optimizer from the call and from DeepSpeed's JSON together, refused where they disagree.

accelerate takes an optimizer from the code or from the configuration, not from both, and drops what only one of its two
ways can carry. Here both speak: what the configuration leaves out or calls "auto" comes from the call, what only the
configuration names is taken from there, and a value that both give must be the same.

The optimizer goes to DeepSpeed as a client optimizer. With an offloaded optimizer, accelerate would exchange such a one
for DeepSpeedCPUAdam without a word; ``"zero_force_ds_cpu_optimizer": false``, which is set here, keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.integrations.deepspeed.engine import PREFIX, build_optimizer_for_engine, is_ours, register
from dist_optim.ranks.agreement import num_ranks
from dist_optim.ranks.together import together

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dist_optim.integrations.deepspeed.optimizer import ZeroOptimizer

__all__ = ["prepare_engine", "refuse_missed_ranks", "settle"]


def prepare_engine(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: str | type[Optimizer],
    has_schedule: bool,
    options: Mapping[str, Any],
) -> tuple[Any, Any, Any, ZeroOptimizer]:
    """DeepSpeed's engine around the model, with the optimizer in it. Collective.

    Args:
        accelerator: Its strategy is DeepSpeed; not yet given this model.
        model: The plain model, possibly made under ``zero.Init``.
        optimizer: A registered name or a class.
        has_schedule: Whether the caller makes a learning-rate schedule.
        options: ``target_modules``, ``no_decay``, ``params``, ``print_audit`` and hyperparameters.

    Returns:
        The engine; accelerate's wrapper of DeepSpeed's wrapper of the optimizer; accelerate's wrapper of the schedule
        that the configuration names (None where it names none); the optimizer itself.

    Raises:
        DistOptimError: On all ranks together, before the model is touched by DeepSpeed.
    """
    from accelerate.utils import DummyOptim, DummyScheduler

    config = accelerator.state.deepspeed_plugin.deepspeed_config

    def build() -> ZeroOptimizer:
        register()
        _refuse_two_schedules(config, has_schedule)
        _fill_in_batch_size(accelerator, config)
        own = settle(config.get("optimizer"), optimizer, options)
        return build_optimizer_for_engine(model, optimizer, **own)

    built = together(build, doing="Building the optimizer", remedy="Check the arguments of prepare.")
    config.pop("optimizer", None)
    config["zero_force_ds_cpu_optimizer"] = False
    given: list[Any] = [model, built]
    if "scheduler" in config:
        given.append(DummyScheduler(DummyOptim([], lr=built.param_groups[0]["lr"])))
    engine, wrapped, *schedules = accelerator.prepare(*given)
    _refuse_other_clipping(accelerator, engine)
    return engine, wrapped, schedules[0] if schedules else None, built


def settle(
    section: Mapping[str, Any] | None, optimizer: str | type[Optimizer], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords of the optimizer, from the configuration's section and from the call.

    Args:
        section: ``{"type": ..., "params": {...}}`` of DeepSpeed's configuration; None where it has none.
        optimizer: What the call asks for.
        options: The call's keywords.

    Raises:
        UnsupportedError: They name two optimizers.
        HyperparameterError: They give two values of one hyperparameter.
    """
    if section is None:
        return dict(options)
    named = str(section.get("type", ""))
    if not is_ours(named) or named.removeprefix(PREFIX) != optimizer:
        asked = optimizer if isinstance(optimizer, str) else optimizer.__name__
        raise UnsupportedError(
            f"The call asks for {asked!r}, and DeepSpeed's configuration for {named!r}. Name the same one in both, or "
            'remove the "optimizer" section from the configuration.'
            + (f" (Written {named!r}, it is DeepSpeed's own; ours is {PREFIX + named!r}.)" if named == asked else "")
        )
    merged = {key: value for key, value in options.items() if value is not None}
    for key, value in (section.get("params") or {}).items():
        if value == "auto":
            continue
        if key in merged and _plain(merged[key]) != _plain(value):
            raise HyperparameterError(
                f"{named}: the call gives {key}={options[key]!r}, and DeepSpeed's configuration {value!r}. Give it "
                f'once, or write "{key}": "auto" in the configuration.'
            )
        merged[key] = value
    return merged


def refuse_missed_ranks(accelerator: Accelerator) -> None:
    """Refuse where accelerate takes each of several CPU ranks for a job of its own.

    Raises:
        UnsupportedError: With what to pass to ``Accelerator``.
    """
    if dist.is_initialized() and accelerator.num_processes != num_ranks():
        raise UnsupportedError(
            f"DeepSpeed runs on {num_ranks()} ranks here, and accelerate sees {accelerator.num_processes}: it does not "
            "count CPU ranks that are DeepSpeed's. Rehearse with "
            "Accelerator(**dist_optim.integrations.cpu_rehearsal.deepspeed_arguments(), ...)."
        )


def _refuse_two_schedules(config: Mapping[str, Any], has_schedule: bool) -> None:
    if "scheduler" in config and has_schedule:
        raise UnsupportedError(
            'The call makes a learning-rate schedule, and DeepSpeed\'s configuration has a "scheduler" section. Remove '
            "one of them."
        )


def _fill_in_batch_size(accelerator: Accelerator, config: dict[str, Any]) -> None:
    """What "auto" means where accelerate would want to see the data loaders in the same call: those prepared before."""
    if config.get("train_micro_batch_size_per_gpu", "auto") != "auto":
        return
    totals = [loader.total_batch_size for loader in accelerator._dataloaders]
    if not totals:
        raise UnsupportedError(
            'DeepSpeed\'s "train_micro_batch_size_per_gpu" is "auto", and accelerate knows no data loader. Call '
            "accelerator.prepare(train_loader, ...) before this, or set the number in the configuration."
        )
    config["train_micro_batch_size_per_gpu"] = totals[0] // accelerator.num_processes


def _refuse_other_clipping(accelerator: Accelerator, engine: Any) -> None:
    """accelerate ignores the bound given to ``clip_grad_norm_`` under DeepSpeed: it must be the engine's own."""
    original: Callable[..., Any] = accelerator.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        if (max_norm, norm_type) != (engine.gradient_clipping(), 2):
            raise UnsupportedError(
                f"DeepSpeed clips by its own configuration, here to {engine.gradient_clipping()}, and "
                f"clip_grad_norm_(..., {max_norm}, {norm_type}) would change nothing. Set "
                f'"gradient_clipping": {max_norm} in the configuration.'
            )
        return original(parameters, max_norm, norm_type)

    accelerator.clip_grad_norm_ = clip_grad_norm_


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
