"""One number out of what each rank gives as its metric: pure arithmetic on plain values, no process group.

A rank gives a number, or the pair (sum, count) of what it has seen, or None where it has nothing. The reduced metric is
the exactly rounded mean, weighted by the counts, over the ranks that gave something finite. It does not depend on the
order of ranks, and equal values reduce to that very value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dist_optim.errors import MetricError

__all__ = ["Contribution", "Reduced", "read_metric", "reduce_metric"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one rank gives: ``total / count`` is its metric, and ``count`` its weight; no total where it has nothing."""

    total: float | None = None
    count: float = 1.0
    is_pair: bool = False

    @property
    def is_absent(self) -> bool:
        """Whether this rank has no metric: none was given, or it has seen no sample."""
        return self.total is None or self.count == 0

    @property
    def value(self) -> float:
        """This rank's own metric."""
        assert self.total is not None
        return self.total / self.count

    @property
    def is_finite(self) -> bool:
        """Whether it counts: given, and neither NaN nor infinite."""
        return not self.is_absent and math.isfinite(self.total or 0.0)


@dataclass(frozen=True, slots=True)
class Reduced:
    """What all ranks' metrics come to."""

    metric: float | None
    """None when ranks gave NaN or infinity alone: there is nothing to decide by."""
    lowest: float | None
    highest: float | None
    num_ranks: int
    """Ranks that gave something finite."""
    ignored_ranks: tuple[int, ...]
    """Ranks that gave NaN or infinity."""


def read_metric(metrics: Any) -> Contribution:
    """This rank's contribution from what the user passed to ``step``.

    Args:
        metrics: A number, a tensor of one element, a pair (sum, count) of either, or None.

    Raises:
        MetricError: It is something else, or the count is negative or not finite.
    """
    if metrics is None:
        return Contribution()
    if isinstance(metrics, (tuple, list)):
        if len(metrics) != 2:
            raise MetricError(f"A metric is a number or a pair (sum, count); {len(metrics)} values were given.")
        count = _number(metrics[1])
        if not math.isfinite(count) or count < 0:
            raise MetricError(f"The count of a metric (sum, count) is {count}; give the number of samples in the sum.")
        return Contribution(_number(metrics[0]), count, is_pair=True)
    return Contribution(_number(metrics))


def _number(value: Any) -> float:
    if isinstance(value, (str, bytes)) or value is None:
        raise MetricError(f"A metric is a number, a tensor of one element or a pair (sum, count), not {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetricError(
            f"A metric is a number, a tensor of one element or a pair (sum, count), not {type(value).__name__}: {error}"
        ) from error


def reduce_metric(
    contributions: Sequence[Contribution], *, from_rank: int | None, on_nonfinite: str, absence: str = ""
) -> Reduced:
    """The metric that all ranks decide by.

    Args:
        contributions: Of every rank, in rank order.
        from_rank: Take this rank's metric alone; None for the mean over ranks.
        on_nonfinite: ``"ignore"``: ranks with NaN or infinity do not count. ``"raise"``: they are an error.
        absence: What to say in the error of why no rank has a metric.

    Raises:
        MetricError: No rank has a metric (or the one asked for has none), pairs and plain numbers are mixed, or a value
            is not finite and that was to be refused.
    """
    given = {rank: one for rank, one in enumerate(contributions) if not one.is_absent}
    if from_rank is not None and from_rank not in given:
        raise MetricError(
            f"metric_from_rank={from_rank}, and that rank gave no metric (ranks that did: {sorted(given) or 'none'}). "
            f"Compute it there, or leave metric_from_rank out. {absence}".rstrip()
        )
    if not given:
        raise MetricError(
            f"No rank gave a metric to decide the learning rate by. {absence or 'Call step(metric) after evaluating.'}"
        )
    chosen = given if from_rank is None else {from_rank: given[from_rank]}
    if len({one.is_pair for one in chosen.values()}) > 1:
        raise MetricError(
            "Some ranks gave a number as their metric and others a pair (sum, count), so that their weights are not "
            "known. Give pairs on all ranks, or numbers on all ranks."
        )
    ignored = tuple(rank for rank, one in chosen.items() if not one.is_finite)
    if ignored and on_nonfinite == "raise":
        raise MetricError(
            f"The metric is not finite on ranks {list(ignored)}: {[chosen[rank].value for rank in ignored]}. Find out "
            'why, or pass on_nonfinite="ignore" to decide by the other ranks.'
        )
    values = [one.value for one in given.values() if one.is_finite]
    return Reduced(
        metric=_mean([one for one in chosen.values() if one.is_finite]),
        lowest=min(values, default=None),
        highest=max(values, default=None),
        num_ranks=len(values),
        ignored_ranks=tuple(rank for rank, one in given.items() if not one.is_finite),
    )


def _mean(contributions: Sequence[Contribution]) -> float | None:
    if not contributions:
        return None
    total = sum((Fraction(one.total or 0.0) for one in contributions), Fraction())
    return float(total / sum((Fraction(one.count) for one in contributions), Fraction()))
