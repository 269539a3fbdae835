"""The arguments of ``build_scheduler``: what each may be."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dist_optim.errors import ScheduleError

__all__ = ["check_decision_options", "check_lengths", "check_schedule", "refuse_decision_options"]

ON_NONFINITE = ("ignore", "raise")


def check_schedule(schedule: Any) -> None:
    """Refuse what is no name, and has no ``step``.

    Raises:
        ScheduleError: With what to pass.
    """
    is_stepped = callable(getattr(schedule, "step", None)) and not _is_optimizer(schedule)
    if not isinstance(schedule, str) and not is_stepped:
        raise ScheduleError(
            f"{schedule!r:.80} is no schedule: pass a name, a class, or an instance with a step method."
        )


def check_lengths(num_training_steps: Any, num_warmup_steps: Any) -> None:
    """Refuse lengths that are no numbers of steps.

    Raises:
        ScheduleError: With what they are.
    """
    if num_training_steps is not None and not (_is_whole(num_training_steps) and num_training_steps > 0):
        raise ScheduleError(
            f"num_training_steps={num_training_steps!r} is not a whole number of optimizer steps, at least 1."
        )
    warmup = 0 if num_warmup_steps is None else num_warmup_steps
    if not _is_number(warmup) or warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise ScheduleError(
            f"num_warmup_steps={num_warmup_steps!r} is neither a number of steps nor a share of them: give a whole "
            "number from 0 on, or a share below 1."
        )


def check_decision_options(options: Mapping[str, Any], num_ranks: int) -> None:
    """Of a metric schedule.

    Raises:
        ScheduleError: With what each option is.
    """
    rank, path = options["metric_from_rank"], options["log_path"]
    if rank is not None and not (_is_whole(rank) and 0 <= rank < num_ranks):
        raise ScheduleError(f"metric_from_rank={rank!r}, and there are {num_ranks} ranks, counted from 0.")
    if options["on_nonfinite"] not in ON_NONFINITE:
        raise ScheduleError(f"on_nonfinite={options['on_nonfinite']!r} is not one of: {', '.join(ON_NONFINITE)}.")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise ScheduleError(f"log_path={path!r:.80} is no path. Pass the name of a file, or None.")
    for key, allowed in (("greater_is_better", (True, False, None)), ("stepped_by_engine", (True, False))):
        if not any(options[key] is one for one in allowed):
            raise ScheduleError(f"{key}={options[key]!r:.80} is none of {', '.join(map(repr, allowed))}.")


def refuse_decision_options(name: str, options: Mapping[str, Any]) -> None:
    """Of a schedule that follows the step count.

    Raises:
        ScheduleError: One of them was given, and would be ignored.
    """
    given = [key for key in ("greater_is_better", "metric_from_rank", "log_path") if options[key] is not None]
    if given:
        raise ScheduleError(
            f"{name} takes no decisions by a metric, and {', '.join(given)} would be ignored. Leave it out, or choose "
            "greedy or reduce_lr_on_plateau."
        )


def _is_optimizer(schedule: Any) -> bool:
    return isinstance(schedule, Optimizer) or (isinstance(schedule, type) and issubclass(schedule, Optimizer))


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
