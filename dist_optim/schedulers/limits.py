"""What metric schedules are given and refused, beyond upstream's own checks.

Upstream takes settings with which the rate can never move, or only one way, or with which param groups lose their
ratios where one of them meets a bound. These are set right where the user left them open, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_optim.errors import ScheduleError
from dist_optim.schedulers.names import Recipe

__all__ = ["complete_options", "learning_rates", "refuse_immovable", "refuse_other_mode", "set_learning_rates"]


def learning_rates(optimizer: Any) -> list[float]:
    """The rate of every param group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(optimizer: Any, rates: Sequence[float]) -> None:
    """Give every param group its rate; tensors keep their identity, since captured graphs read them."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def complete_options(
    recipe: Recipe, optimizer: Any, options: Mapping[str, Any], greater_is_better: bool | None
) -> dict[str, Any]:
    """The options with which upstream does what was meant.

    ``mode`` follows ``greater_is_better``. Where param groups have unlike rates, a bound given as one number is that of
    the largest rate, and each group's own is smaller in proportion; the least change ``eps``, which is one number to
    upstream, is then 0 unless given.

    Raises:
        ScheduleError: ``mode`` contradicts ``greater_is_better``.
    """
    completed = dict(options)
    known = recipe.options
    if greater_is_better is not None and "mode" in known:
        mode = "max" if greater_is_better else "min"
        _refuse_contradiction(completed.setdefault("mode", mode), greater_is_better)
    rates = learning_rates(optimizer)
    if len(set(rates)) == 1 or max(rates) <= 0:
        return completed
    for bound in ("min_lr", "max_lr"):
        value = completed.get(bound, known[bound].default if bound in known else None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            completed[bound] = [value * rate / max(rates) for rate in rates]
    if "eps" in known:
        completed.setdefault("eps", 0.0)
    return completed


def refuse_other_mode(schedule: Any, greater_is_better: bool | None) -> None:
    """Refuse an instance that was built for a metric of the other direction."""
    if greater_is_better is not None and hasattr(schedule, "mode"):
        _refuse_contradiction(schedule.mode, greater_is_better)


def _refuse_contradiction(mode: str, greater_is_better: bool) -> None:
    if mode in ("min", "max") and (mode == "max") != greater_is_better:
        raise ScheduleError(
            f"mode={mode!r} contradicts greater_is_better={greater_is_better}: the schedule would take an improvement "
            f"for the opposite. Leave mode out, or set greater_is_better={mode == 'max'}."
        )


def refuse_immovable(name: str, schedule: Any, optimizer: Any) -> None:
    """Refuse bounds between which the current rates do not lie, and a least change that no change reaches.

    Raises:
        ScheduleError: With the value to set.
    """
    rates = learning_rates(optimizer)
    lows, highs = getattr(schedule, "min_lrs", None), getattr(schedule, "max_lrs", None)
    factor, eps = getattr(schedule, "factor", None), getattr(schedule, "eps", None)
    for number, rate in enumerate(rates):
        where = f"{name}: the learning rate of param group {number} is {rate:g}"
        if lows is not None and lows[number] > rate:
            raise ScheduleError(
                f"{where}, below min_lr={lows[number]:g}. It could never fall, only stay or rise. "
                f"Give a smaller bound, for example min_lr={rate / 100:g}, or a larger learning rate."
            )
        if highs is not None and highs[number] < rate:
            raise ScheduleError(
                f"{where}, above max_lr={highs[number]:g}. It could never rise. Give a larger bound, for example "
                f"max_lr={rate * 10:g}, or a smaller learning rate."
            )
        if factor is not None and eps is not None and rate > 0 and rate * (1 - factor) <= eps:
            raise ScheduleError(
                f"{where}, and a change by factor={factor:g} is less than eps={eps:g}, the least that the schedule "
                "makes: it would never move. Give eps=0."
            )
