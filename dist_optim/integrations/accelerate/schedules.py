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
from dist_optim.schedulers import MetricScheduler, build_scheduler, metric_scheduler_in

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ScheduleChoice", "attach_schedule", "refuse_stray_options", "schedule_of_engine"]

ScheduleChoice = str | type | Callable[[Optimizer], Any]


def refuse_stray_options(scheduler: ScheduleChoice | None, options: Mapping[str, Any] | None) -> None:
    """Refuse options that no schedule would get."""
    if options and not isinstance(scheduler, (str, type)):
        raise ScheduleError(
            f"scheduler_options={dict(options)} would reach no schedule: pass scheduler= as a name or a class with "
            "them; a function makes its schedule by itself."
        )


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
        schedule = build_scheduler(built, scheduler(built))
    if not isinstance(schedule, MetricScheduler):
        # split_batches=True is accelerate's word for "one step a call": its default steps num_processes times.
        schedule = AcceleratedScheduler(schedule, [prepared], step_with_optimizer=True, split_batches=True)
    accelerator._schedulers.append(schedule)
    return schedule


def schedule_of_engine(wrapped: Any) -> Any:
    """What a user of DeepSpeed's JSON steps: a metric schedule itself, since accelerate's wrapper drops its metric."""
    return metric_scheduler_in(wrapped) or wrapped
