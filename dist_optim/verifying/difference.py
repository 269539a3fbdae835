"""Where two trajectories part first, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dist_optim.specs.same_bits import same

__all__ = ["Difference", "largest_difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not what it is in one process."""

    name: str
    shape: tuple[int, ...]
    step: int
    """The number of the step after which it was seen, from 1."""
    absolute: float
    """The largest difference of an element; NaN where one side is not a number."""
    relative: float
    """The same in units of the largest element of the reference."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"absolute": repr(self.absolute), "relative": repr(self.relative)}

    def __str__(self) -> str:
        size = f"{self.absolute:.3g} ({self.relative:.3g} of its largest element)"
        return f"{self.name!r} {self.shape} after step {self.step}, by {size}"


def largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], step: int) -> Difference | None:
    """The tensor that differs most from what it should be.

    Args:
        actual: By name; in any precision that holds the values of ``expected``.
        expected: By name.
        step: After which the tensors were taken.

    Returns:
        None where all are equal to the bit; zero and minus zero are not.
    """
    unequal = {name: one for name, one in expected.items() if not same(actual[name].to(one.device), one)}
    gaps = [_gap(name, actual[name], one, step) for name, one in unequal.items()]
    return max(gaps, key=lambda gap: (gap.absolute != gap.absolute, gap.absolute), default=None)


def _gap(name: str, actual: Tensor, expected: Tensor, step: int) -> Difference:
    ours, theirs = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    if ours.shape != theirs.shape or not theirs.numel():
        return Difference(name, tuple(expected.shape), step, float("nan"), float("nan"))
    absolute, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return Difference(name, tuple(expected.shape), step, absolute, absolute / scale if scale else absolute)
