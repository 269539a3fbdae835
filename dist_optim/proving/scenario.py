"""The tiny model and the schedule of a proof: long and varied enough for what comes late, rarely, or for large tensors.

Gradients are correlated over steps and noisy. They are drawn tensor by tensor, so that they are the same whichever
tensors are stepped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Replicated
from dist_optim.specs.driver import ParamGroup

__all__ = ["Scenario", "Step", "scenarios_of"]

Feature = Literal["nonfinite", "swap", "closure", "absent", "spike", "zero", "still"]
SIDES = (6, 5, 4, 3)
LARGE = (17, 24)
"""Sides of two larger matrices, for thresholds on sizes."""
LARGEST, LARGEST_CUBE = 136, 20
"""Sides in the scenario of nearly true sizes: of vectors and matrices, and of tensors with more dimensions."""
PER_KIND = 2
"""Tensors of each number of dimensions that are taken from a param group: of equal shape, where they are large."""
MANY = 12
"""Tensors above which one of each kind is taken."""
NUM_LONG, NUM_SHORT, NUM_SIZED = 520, 48, 4
LATE = 45
"""The step in which the last tensor gets its first gradient."""
WARMUP = 12
DROPPED_IN_ORDER: tuple[Feature, ...] = ("nonfinite", "swap", "closure", "absent", "spike", "zero", "still")
"""A step is *still* where the learning rate is 0: some classes divide by it."""
ALMOST_STILL = 1e-3


@dataclass(frozen=True, slots=True)
class Step:
    """What is particular about a step; nothing, for most."""

    scale: float = 1.0
    rate: float | None = None
    """Factor of the base learning rate, where a schedule sets it before this step."""
    features: frozenset[Feature] = frozenset()


@dataclass(frozen=True, eq=False)
class Scenario:
    """Groups of tiny tensors, and what happens to them."""

    name: str
    groups: list[ParamGroup]
    steps: tuple[Step, ...]
    _streams: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def placed(self) -> list[PlacedParameter]:
        """All tensors, in order."""
        return [one for group in self.groups for one in group["params"]]

    def without(self, features: frozenset[Feature] | set[Feature]) -> Scenario:
        """The same, with these features left out everywhere."""
        steps = tuple(replace(step, features=step.features - features) for step in self.steps)
        if "still" in features:
            steps = tuple(replace(step, rate=ALMOST_STILL) if step.rate == 0 else step for step in steps)
        return replace(self, steps=steps)

    def until(self, step: int) -> Scenario:
        """The first steps of it."""
        return replace(self, steps=self.steps[:step])

    def is_present(self, index: int, at: int) -> bool:
        """Whether a tensor has a gradient in this step."""
        if "absent" not in self.steps[at].features:
            return True
        count = len(self.placed)
        if index == count - 1 and at < LATE:
            return count == 1
        if at < LATE or count == 1:
            return True
        if at % 29 == 17:
            return index == at % count
        return (at + 3 * index) % 7 != 5 and at % 31 != 4

    def gradient(self, index: int, at: int, stream: int = 0) -> Tensor:
        """A tensor's gradient in a step, as a new tensor."""
        placed, step = self.placed[index], self.steps[at]
        # What would overflow is no gradient: in fp16 the largest are smaller.
        value = self._stream(index, stream)[at] * min(step.scale, torch.finfo(placed.dtype).max / 1e3)
        chosen = at % len(self.placed) == index
        if "spike" in step.features and chosen:
            value = value * 1e4
        if "zero" in step.features and (chosen or at % 2 == 0):
            value = torch.zeros_like(value)
        if "nonfinite" in step.features and index == 0:
            value = value + (float("inf") if at % 2 else float("nan"))
        return value.to(placed.device, placed.dtype, copy=True)

    def _stream(self, index: int, stream: int) -> Tensor:
        """All gradients of one tensor, before they are scaled."""
        if (index, stream) not in self._streams:
            generator = torch.Generator().manual_seed(1000 * stream + index)
            shape = self.placed[index].shape
            direction = torch.randn(shape, generator=generator, device="cpu")
            noise = torch.randn((len(self.steps), *shape), generator=generator, device="cpu")
            self._streams[index, stream] = direction + 0.4 * noise
        return self._streams[index, stream]


def scenarios_of(groups: Sequence[ParamGroup]) -> list[Scenario]:
    """What is tried: a long run, small and large gradients, nearly true sizes; in fp32 too where the model is not."""
    tiny = _tiny_groups(groups, large=True)
    small = _tiny_groups(groups, large=False)
    short: dict[str, list[float]] = {
        "small gradients": [10.0 ** -(at * 8 / NUM_SHORT) for at in range(NUM_SHORT)],
        "large gradients": [10.0 ** (at * 8 / NUM_SHORT) for at in range(NUM_SHORT)],
    }
    found = [Scenario("long", tiny, _long_schedule())]
    found += [Scenario(name, small, _short_schedule(scales, "large" in name)) for name, scales in short.items()]
    if any(one.dtype is not torch.float32 for one in found[0].placed):
        in_fp32 = _tiny_groups(groups, large=False, dtype=torch.float32)
        found.append(Scenario("fp32", in_fp32, _short_schedule([1.0] * NUM_SHORT, False)))
    steps = tuple(Step(1.0, 1.0 if at == 0 else None) for at in range(NUM_SIZED))
    found.append(Scenario("sizes", _tiny_groups(groups, large=False, longest=LARGEST), steps))
    return found


def _long_schedule() -> tuple[Step, ...]:
    steps = []
    for at in range(NUM_LONG):
        features: set[Feature] = set()
        if at < LATE + 75 or at % 50 > 44:
            features.add("absent")
        if at % 37 == 30:
            features.add("zero")
        if at % 41 == 33:
            features.add("spike")
        if LATE + 15 <= at < LATE + 21 or at % 100 == 99:
            features.add("closure")
        if at in (LATE + 30, LATE + 47, 300):
            features.add("swap")
        if at == 0 or 200 <= at < 203:
            features.add("still")
        rate = at / WARMUP if at <= WARMUP else {100: 0.5, 200: 0.0, 203: 1.0, 400: 0.25}.get(at)
        steps.append(Step((1.0, 1e-2, 3.0, 30.0)[at // 40 % 4], rate, frozenset(features)))
    return tuple(steps)


def _short_schedule(scales: Sequence[float], ends_badly: bool) -> tuple[Step, ...]:
    bad: frozenset[Feature] = frozenset({"nonfinite"})
    first = len(scales) - 5 if ends_badly else len(scales)
    return tuple(
        Step(scale, 1.0 if at == 0 else None, bad if at >= first else frozenset()) for at, scale in enumerate(scales)
    )


def _tiny_groups(
    groups: Sequence[ParamGroup], *, large: bool, longest: int = 0, dtype: torch.dtype | None = None
) -> list[ParamGroup]:
    """The same groups, with a few tiny tensors of each number of dimensions in place of the real ones."""
    generator = torch.Generator().manual_seed(1)
    per_kind = PER_KIND if _count(groups, PER_KIND) <= MANY else 1
    tiny: list[ParamGroup] = []
    for group in groups:
        members = [
            _tiny(placed, _shape(placed, longest), dtype or placed.dtype, generator) for placed in _few(group, per_kind)
        ]
        matrix = next((placed for placed in members if len(placed.shape) == 2), None)
        if large and matrix is not None:
            for name in ("large_1.", "large_2."):
                named = replace(matrix, fqn=name + matrix.fqn)
                members.append(_tiny(named, torch.Size(LARGE), matrix.dtype, generator))
            large = False
        tiny.append({**group, "params": members})
    return [group for group in tiny if group["params"]]


def _few(group: ParamGroup, per_kind: int) -> list[PlacedParameter]:
    """The first trained tensors of each kind: classes treat vectors, rows, tall and wide matrices by their own ways."""
    taken: dict[tuple[object, ...], list[PlacedParameter]] = {}
    for placed in group["params"]:
        is_wide = len(placed.shape) > 1 and placed.shape[0] < placed.shape[1]
        kind = (len(placed.shape), placed.dtype, tuple(side == 1 for side in placed.shape), is_wide)
        alike = taken.setdefault(kind, [])
        if len(alike) < per_kind and placed.is_trained:
            alike.append(placed)
    return [placed for alike in taken.values() for placed in alike]


def _count(groups: Sequence[ParamGroup], per_kind: int) -> int:
    return sum(len(_few(group, per_kind)) for group in groups)


def _shape(placed: PlacedParameter, longest: int) -> torch.Size:
    if longest:
        return torch.Size(min(side, longest if len(placed.shape) < 3 else LARGEST_CUBE) for side in placed.shape)
    return torch.Size(min(side, SIDES[at % len(SIDES)]) for at, side in enumerate(placed.shape))


def _tiny(
    placed: PlacedParameter, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> PlacedParameter:
    value = torch.randn(shape, generator=generator, device="cpu").to(placed.device, dtype)
    return PlacedParameter(placed.fqn, nn.Parameter(value), shape, Replicated(), None)
