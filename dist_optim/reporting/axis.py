"""An axis: from values to places on it, where its lines are, and how values are written."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Axis", "Unit", "axis_of", "written"]

LOG_FROM = 100.0
"""An axis is logarithmic where the largest value is so many times the smallest."""
FLAT = 0.002
"""Values that differ by less of themselves are drawn as equal ones are."""
NUM_LINES = 5
LARGEST = 1e250
"""What is beyond is at the axis' end."""


class Unit(enum.Enum):
    NUMBER = ""
    SECONDS = "s"
    BYTES = "B"
    SHARE = "%"


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``, which lie at 0 and 1."""

    low: float
    high: float
    is_log: bool = False
    base: float = 10.0

    def at(self, value: float) -> float:
        """Where a value lies: 0 for ``low``, 1 for ``high``, and nothing beyond them."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def lines(self) -> list[float]:
        """Round values inside it."""
        if self.is_log:
            return _log_lines(self.low, self.high)
        step = _round_step((self.high - self.low) / NUM_LINES, self.base)
        first = math.ceil(self.low / step - 1e-9)
        found: list[float] = []
        while first * step <= self.high + 1e-9 * step and len(found) <= 2 * NUM_LINES:
            found.append(first * step)
            first += 1
        return found


def axis_of(values: Iterable[float], *, may_be_log: bool = False, is_whole: bool = False, base: float = 10.0) -> Axis:
    """The axis for these values, with a little room around them.

    Args:
        values: Finite.
        may_be_log: Whether it is logarithmic where values differ much.
        is_whole: Whether the values stand for numbers of steps.
        base: 1024 for bytes.
    """
    given = [min(max(value, -LARGEST), LARGEST) for value in values] or [0.0]
    low, high = min(given), max(given)
    if may_be_log and low > 1 / LARGEST and high >= LOG_FROM * low:
        return Axis(low / 1.3, high * 1.3, is_log=True)
    if is_whole:
        return Axis(low, high if high > low else low + max(1.0, 0.01 * abs(low)))
    is_flat = high - low <= FLAT * abs(high)
    room = max(0.05 * abs(high) if is_flat else 0.06 * (high - low), 1 / LARGEST) if high or low else 1.0
    return Axis(0.0 if 0 <= low < 0.3 * high else low - room, high + room, base=base)


def _round_step(least: float, base: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten (of bytes: of a power of two) that is not below this."""
    if base != 10.0:
        return 2.0 ** math.ceil(math.log2(least))
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * times for times in (1.0, 2.0, 5.0, 10.0) if power * times >= least * (1 - 1e-9))


def _log_lines(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = max(1, math.ceil((last - first + 1) / NUM_LINES))
    return [10.0**power for power in range(first, last + 1, every)]


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


def written(value: float, unit: Unit = Unit.NUMBER) -> str:
    """A value in few characters: ``1.25k``, ``12 ms``, ``3.4 MiB``, ``35 %``, ``2e-05``."""
    if unit is Unit.SHARE:
        return f"{100 * value:.4g} %"
    if unit is Unit.SECONDS and 0 < abs(value) < 1:
        return f"{1e6 * value:.3g} µs" if abs(value) < 1e-3 else f"{1e3 * value:.3g} ms"
    if unit is Unit.BYTES:
        size, prefix = next(((size, prefix) for size, prefix in BINARY if abs(value) >= size), (1.0, "B"))
        return f"{value / size:.4g} {prefix}"
    if unit is Unit.SECONDS:
        return f"{value:.4g} s"
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    size, prefix = next(((size, prefix) for size, prefix in PREFIXES if abs(value) >= size), (1.0, ""))
    return f"{value / size:.4g}{prefix}"
