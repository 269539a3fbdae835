"""``build_scheduler``: from an optimizer and a name, a class or an instance to a schedule that all ranks share."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_optim.building.arguments import check_process_group
from dist_optim.errors import ScheduleError
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.ranks.together import together
from dist_optim.schedulers.arguments import (
    check_decision_options,
    check_lengths,
    check_schedule,
    refuse_decision_options,
)
from dist_optim.schedulers.limits import complete_options, refuse_immovable, refuse_other_mode
from dist_optim.schedulers.names import Recipe, resolve_schedule, takes_metric
from dist_optim.schedulers.shared import MetricScheduler
from dist_optim.specs.registry import Trait
from dist_optim.specs.unwrapping import find_optimizer

__all__ = ["build_scheduler", "inner_optimizer", "metric_scheduler_in"]


def build_scheduler(
    optimizer: Any,
    schedule: str | type | LRScheduler | MetricScheduler | Any,
    *,
    num_training_steps: int | None = None,
    num_warmup_steps: float = 0,
    greater_is_better: bool | None = None,
    metric_from_rank: int | None = None,
    on_nonfinite: str = "ignore",
    log_path: str | os.PathLike[str] | None = None,
    stepped_by_engine: bool = False,
    process_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> LRScheduler | MetricScheduler:
    """Build a learning-rate schedule; upstream's class does the arithmetic.

    Collective: every rank calls it with the same arguments, and a mistake raises on all ranks together.

    Args:
        optimizer: Any optimizer, also inside accelerate's or DeepSpeed's wrapper.
        schedule: A name (``dist_optim.schedulers.schedule_names()``, or that of a class of
            ``torch.optim.lr_scheduler``), a class, or a schedule that is already built on this optimizer.
        num_training_steps: Length of the training, in optimizer steps, for schedules that need it.
        num_warmup_steps: Steps of rising rate; below 1, a share of ``num_training_steps``, rounded up.
        greater_is_better: Of a metric schedule: which way its metric improves; sets upstream's ``mode``.
        metric_from_rank: Of a metric schedule: decide by this rank's metric, instead of the mean over ranks.
        on_nonfinite: Of a metric schedule: ``"ignore"`` ranks whose metric is NaN or infinite, or ``"raise"``.
        log_path: Of a metric schedule: the JSON-lines file for its decisions; the first rank writes it.
        stepped_by_engine: Of a metric schedule: ``step()`` without a metric does nothing, since an engine calls it.
        process_group: The ranks that train together; by default the optimizer's.
        **options: Upstream's own, under upstream's names and with its defaults.

    Returns:
        Upstream's schedule for what follows the step count; a ``MetricScheduler`` for what follows a metric.

    Raises:
        ScheduleError: Unknown name or option, missing length, or bounds between which the rate could not move.
        MissingPackageError: The name is one of transformers', which is not installed.
    """
    check_process_group(process_group)
    found = find_optimizer(optimizer, Optimizer)
    group = process_group if process_group is not None else getattr(getattr(found, "holdings", None), "all_ranks", None)
    decision_options = {
        "greater_is_better": greater_is_better,
        "metric_from_rank": metric_from_rank,
        "on_nonfinite": on_nonfinite,
        "log_path": log_path,
        "stepped_by_engine": stepped_by_engine,
    }
    lengths = {"num_training_steps": num_training_steps, "num_warmup_steps": num_warmup_steps}

    def build() -> Any:
        inner = inner_optimizer(optimizer)
        check_schedule(schedule)
        check_lengths(**lengths)
        if isinstance(schedule, (str, type)):
            return _build(inner, resolve_schedule(schedule), lengths, decision_options, options, group)
        return _adopt(inner, schedule, lengths, decision_options, options, group)

    built = together(
        build,
        group,
        doing="Building the learning-rate schedule",
        remedy="Check the arguments of build_scheduler.",
        otherwise=ScheduleError,
    )
    if schedule != "constant":
        _point_out_schedule_free(found, group)
    return built


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's and DeepSpeed's wrappers: its param groups are the ones that steps read.

    Raises:
        ScheduleError: There is none.
    """
    inner = find_optimizer(optimizer, Optimizer)
    if inner is None:
        raise ScheduleError(
            f"{type(optimizer).__name__} is not an optimizer, nor a wrapper of one. Pass the optimizer that "
            "build_optimizer, prepare or deepspeed.initialize returned."
        )
    return inner


def metric_scheduler_in(scheduler: Any) -> MetricScheduler | None:
    """The ``MetricScheduler`` itself, or inside a wrapper of accelerate's; None where there is none."""
    seen = scheduler
    while seen is not None and not isinstance(seen, MetricScheduler):
        seen = getattr(seen, "scheduler", None)
    return seen


def _build(
    optimizer: Optimizer,
    recipe: Recipe,
    lengths: Mapping[str, Any],
    decision_options: Mapping[str, Any],
    options: Mapping[str, Any],
    group: dist.ProcessGroup | None,
) -> Any:
    recipe.check(options)
    keywords = {**options, **_lengths(recipe, **lengths)}
    if recipe.is_metric_driven:
        check_decision_options(decision_options, num_ranks(group))
        keywords = complete_options(recipe, optimizer, keywords, decision_options["greater_is_better"])
    else:
        refuse_decision_options(recipe.name, decision_options)
    try:
        schedule = recipe.make(optimizer, **keywords)
    except Exception as error:  # upstream's checks of options are of many kinds
        raise ScheduleError(f"{recipe.name} cannot be built with {keywords}: {error}") from error
    return _shared(schedule, recipe.name, decision_options, group) if recipe.is_metric_driven else schedule


def _adopt(
    optimizer: Optimizer,
    schedule: Any,
    lengths: Mapping[str, Any],
    decision_options: Mapping[str, Any],
    options: Mapping[str, Any],
    group: dist.ProcessGroup | None,
) -> Any:
    """A schedule that exists: shared where it follows a metric, as it is otherwise."""
    name = type(schedule).__name__
    given = [*options, *(key for key, value in lengths.items() if value)]
    if given:
        raise ScheduleError(
            f"{name} is built already, so that {', '.join(given)} cannot reach it. Set them where it is built, or pass "
            "the class or name in place of the instance."
        )
    held = getattr(schedule, "optimizer", None)
    if held is not None and inner_optimizer(held) is not optimizer:
        raise ScheduleError(
            f"{name} was built on another optimizer, whose rates nothing reads. Build it on the optimizer that is "
            "trained with, or pass the class or name in place of the instance."
        )
    if isinstance(schedule, MetricScheduler) or not takes_metric(schedule):
        refuse_decision_options(f"{name} as it was passed", decision_options)
        return schedule
    check_decision_options(decision_options, num_ranks(group))
    refuse_other_mode(schedule, decision_options["greater_is_better"])
    return _shared(schedule, name, decision_options, group)


def _shared(
    schedule: Any, name: str, decision_options: Mapping[str, Any], group: dist.ProcessGroup | None
) -> MetricScheduler:
    refuse_immovable(name, schedule, schedule.optimizer)
    own = {key: value for key, value in decision_options.items() if key != "greater_is_better"}
    return MetricScheduler(schedule, name, process_group=group, **own)


def _lengths(recipe: Recipe, num_training_steps: int | None, num_warmup_steps: float) -> dict[str, int]:
    """The lengths that this schedule is made from, as whole steps."""
    taken = recipe.lengths
    lengths: dict[str, int] = {}
    warmup = num_warmup_steps or 0
    if warmup and "num_warmup_steps" not in taken:
        raise ScheduleError(
            f"{recipe.name} has no warm-up of the learning rate, and num_warmup_steps={num_warmup_steps} would be "
            "ignored. Leave it out (warmup_steps=0), or choose a schedule that has one: constant_with_warmup, linear, "
            "cosine."
        )
    if num_training_steps is None and (0 < warmup < 1 or _is_required(taken, "num_training_steps")):
        raise ScheduleError(
            f"{recipe.name} needs the length of the training. Pass num_training_steps, the number of optimizer steps."
        )
    if "num_warmup_steps" in taken:
        lengths["num_warmup_steps"] = math.ceil(warmup * (num_training_steps or 0)) if warmup < 1 else int(warmup)
    if num_training_steps is not None and "num_training_steps" in taken:
        lengths["num_training_steps"] = num_training_steps
    return lengths


def _is_required(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in parameters and parameters[name].default is inspect.Parameter.empty


def _point_out_schedule_free(optimizer: Optimizer | None, group: dist.ProcessGroup | None) -> None:
    spec = getattr(optimizer, "spec", None)
    if spec is not None and Trait.WEIGHT_SWAPPING in spec.traits and own_rank(group) == 0:
        warnings.warn(
            f"{spec.name} averages its iterates in place of a schedule, and is meant for a constant learning rate; a "
            "schedule on top is obeyed, but changes the method. Its own warm-up is the option warmup_steps of the "
            'optimizer. Use the schedule "constant" unless this is what you want.',
            stacklevel=3,
        )
