"""accelerate: a schedule that steps once a call, and one that follows a metric and never misses one.

accelerate's wrapper of a schedule repeats each step for every process, and drops it while gradients accumulate or
after a step that fp16 skipped. For a schedule that follows the step count, the second is right and the first is turned
off; one that follows a metric is not wrapped at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from dist_optim.errors import ScheduleError
from dist_optim.ranks.together import together
from dist_optim.schedulers import MetricScheduler, build_scheduler, metric_scheduler_in

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ScheduleChoice", "attach_schedule", "refuse_schedule", "schedule_of_engine"]

ScheduleChoice = str | type | Callable[[Optimizer], Any]


def refuse_schedule(scheduler: ScheduleChoice | None, options: Mapping[str, Any] | None) -> None:
    """Refuse what no schedule can be made of, and options that no schedule would get.

    Raises:
        ScheduleError: With what to pass.
    """
    if scheduler is not None and not isinstance(scheduler, (str, type)) and not _makes_schedules(scheduler):
        raise ScheduleError(
            f"scheduler is {type(scheduler).__name__} built already, on an optimizer that is not the one to be built "
            "here. Pass its name or class with scheduler_options={...}, or a function of the optimizer: "
            "scheduler=lambda optimizer: ..."
            if callable(getattr(scheduler, "step", None))
            else f"scheduler={scheduler!r:.80} is no schedule. Pass a name, a class, or a function that makes one of "
            "an optimizer."
        )
    if options is not None and not isinstance(options, Mapping):
        raise ScheduleError(f"scheduler_options={options!r:.80} is no dict of keywords. Pass {{'name': value}}.")
    if options and not isinstance(scheduler, (str, type)):
        raise ScheduleError(
            f"scheduler_options={dict(options)} would reach no schedule: pass scheduler= as a name or a class with "
            "them; a function makes its schedule by itself."
        )


def _makes_schedules(scheduler: Any) -> bool:
    return callable(scheduler) and not callable(getattr(scheduler, "step", None))


def attach_schedule(
    accelerator: Accelerator,
    built: Optimizer,
    prepared: Any,
    scheduler: ScheduleChoice,
    options: Mapping[str, Any] | None,
) -> Any:
    """Build a schedule, and have accelerate save and load it. Collective.

    Args:
        accelerator: Knows ``prepared``.
        built: The optimizer.
        prepared: The same in accelerate's wrapper.
        scheduler: A name, a class, or a function that makes a schedule of an optimizer.
        options: Keywords of ``build_scheduler`` for a name or a class.

    Returns:
        accelerate's wrapper, or a ``MetricScheduler``.
    """
    from accelerate.scheduler import AcceleratedScheduler

    if isinstance(scheduler, (str, type)):
        schedule = build_scheduler(built, scheduler, **(options or {}))
    else:
        made = together(
            lambda: scheduler(built),
            doing="Making the learning-rate schedule by scheduler(optimizer)",
            remedy="Check the function that was passed as scheduler.",
            otherwise=ScheduleError,
        )
        schedule = build_scheduler(built, made)
    if not isinstance(schedule, MetricScheduler):
        # split_batches=True is accelerate's word for "one step a call": its default steps num_processes times.
        schedule = AcceleratedScheduler(schedule, [prepared], step_with_optimizer=True, split_batches=True)
    accelerator._schedulers.append(schedule)
    return schedule


def schedule_of_engine(wrapped: Any) -> Any:
    """What a user of DeepSpeed's JSON steps: a metric schedule itself, since accelerate's wrapper drops its metric."""
    return metric_scheduler_in(wrapped) or wrapped
