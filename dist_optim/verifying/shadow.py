"""``verify_steps``: the first steps of a run are stepped a second time, by upstream alone, and compared to the bit.

Rank 0 holds the whole model once more, with its gradients and state, until the last of these steps is compared. The run
itself is not touched: random states are as without it, and upstream's second copy has tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dist_optim.errors import UnsupportedError
from dist_optim.generators import Generators, generators_kept, read_generators, write_generators
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.ranks.together import together
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.division import is_half
from dist_optim.stepping.group_values import GroupValues
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.verifying.difference import Difference, largest_difference
from dist_optim.verifying.reference import Reference
from dist_optim.verifying.whole import whole_tensors

__all__ = ["VerifiedSteps"]

Result = TypeVar("Result")
REMEDY = "Leave verify_steps out, or verify a smaller model: dist-optim verify."


def refuse_closures(spec: OptimizerSpec) -> None:
    """Refuse a class that makes evaluations of its own in a step; the same on all ranks.

    Raises:
        UnsupportedError: With what to do.
    """
    verdict = spec.verdict
    if verdict is not None and (verdict.needs_closure or verdict.evaluations > 1):
        raise UnsupportedError(
            f"{spec.name}: verify_steps takes a step a second time from its gradients, and this class evaluates the "
            "loss itself, in step(closure). Leave verify_steps out."
        )


class VerifiedSteps:
    """A shadow of an optimizer for its first steps. All methods are collective on all ranks of the optimizer.

    Args:
        parts: The optimizer as it was built; nothing was stepped yet. Several, each of some of the parameters, where an
            engine steps a model in parts.
        num_steps: How many steps to take twice.
        look: Lets the parts show the weights as they are now.
    """

    def __init__(self, parts: Sequence[DistributedOptimizer], num_steps: int, look: Callable[[], None]) -> None:
        self.num_steps = num_steps
        self.num_compared = 0
        self.difference: Difference | None = None
        """The first that was found; the same on all ranks."""
        self.ended_by = ""
        """Why fewer steps were compared; empty where all were."""
        self._name, self._num_parameters = parts[0].spec.name, len(parts[0].holdings.placed)
        self._parts, self._look = list(parts), look
        self._gradients: dict[str, Tensor] = {}
        self._generators: Generators = {}
        self._reference = self._built()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is compared, and the shadow is freed."""
        return not self._parts

    def _built(self) -> _Shadow | None:
        values, is_first = self._weights(), self._is_first
        return self._together(lambda: _Shadow(self._parts, values) if is_first else None, "building it")

    def before_step(self, has_closure: bool = False) -> None:
        """Before a step that is agreed on: take what it starts from.

        Args:
            has_closure: Whether upstream is given a closure.
        """
        if self.is_over:
            return
        if reason := self._why_no_more(has_closure):
            self._end(reason)
            return
        weights, shadow = self._weights(), self._reference
        self._generators = read_generators()
        self._together(lambda: shadow.show(weights) if shadow else None, "copying the weights")

    def take_gradients(self, part: int, gradients: Mapping[int, Tensor]) -> None:
        """Right before a part of it is stepped.

        Args:
            part: Its number.
            gradients: This rank's part of each, by index.
        """
        if not self.is_over:
            held = self._parts[part].holdings
            self._gradients |= whole_tensors(held.placed, gradients, held.process_group)

    def after_step(self) -> None:
        """After that step: take it again, and compare."""
        if self.is_over:
            return
        weights, shadow, number = self._weights(), self._reference, self.num_compared + 1

        def step_and_compare() -> Difference | None:
            if shadow is None:
                return None
            expected = shadow.step(self._gradients, self._generators)
            return largest_difference(weights, {name: expected[name] for name in weights}, number)

        found = self._together(step_and_compare, f"step {number}")
        self.difference = gather_objects(found, self._parts[0].holdings.all_ranks)[0]
        self.num_compared = number
        self._gradients = {}
        if self.difference is not None or number == self.num_steps:
            self._end()

    def swap(self, mode: str) -> None:
        """Upstream exchanges training and averaged weights."""
        shadow = self._reference
        if not self.is_over:
            self._together(lambda: shadow.reference.swap(mode) if shadow else None, f"{mode}()")

    def report(self) -> str:
        """What came out, in one line."""
        name = f"upstream's {self._name} in one process"
        steps = f"the first {self.num_compared} steps" if self.num_compared != 1 else "the first step"
        if self.difference is not None:
            return f"dist_optim: verify_steps: DIFFERENT from {name}: {self.difference}"
        if not self.num_compared:
            return f"dist_optim: verify_steps: nothing was compared: {self.ended_by}"
        more = f"; no more was compared: {self.ended_by}" if self.ended_by else ""
        return f"dist_optim: verify_steps: {steps}: equal to {name}, to the bit{more}"

    def _why_no_more(self, has_closure: bool) -> str:
        every = [part.progress for part in self._parts]
        if any(progress.num_loads for progress in every):
            return "state was loaded, and it starts without any"
        if any(progress.num_calls or progress.num_steps != self.num_compared for progress in every):
            return "a method of the class's own was called"
        if len(self._parts[0].holdings.placed) != self._num_parameters:
            return "a param group was added"
        return "the class is given a closure" if has_closure else ""

    def _end(self, reason: str = "") -> None:
        self.ended_by, is_first = reason, self._is_first
        self._parts, self._reference, self._look = [], None, _see_nothing
        self._gradients, self._generators = {}, {}
        if is_first:
            print(self.report(), flush=True)

    @property
    def _is_first(self) -> bool:
        """Rank 0 of the job, which is the first of its shard groups too."""
        held = self._parts[0].holdings
        return own_rank(held.all_ranks) == 0 and own_rank(held.process_group) == 0

    def _weights(self) -> dict[str, Tensor]:
        """Whole weights on the first rank, of what the parts hold."""
        self._look()
        found: dict[str, Tensor] = {}
        for part in self._parts:
            held = part.holdings
            here = {at: one for at, one in enumerate(held.placed) if not isinstance(one.layout, Elsewhere)}
            found |= whole_tensors(held.placed, {at: one.local() for at, one in here.items()}, held.process_group)
        return found

    def _together(self, action: Callable[[], Result], what: str) -> Result:
        ranks = self._parts[0].holdings.all_ranks
        return together(action, ranks, doing=f"verify_steps, {what}", remedy=REMEDY)


def _see_nothing() -> None:
    """Of what is over."""


class _Shadow:
    """Upstream's copy on the first rank, in the precision in which it steps."""

    def __init__(self, parts: Sequence[DistributedOptimizer], values: Mapping[str, Tensor]) -> None:
        held = parts[0].holdings
        division = held.division
        self._groups, self._keys = held.groups, held.pushed_keys
        self._dtypes = {one.fqn: one.dtype for one in held.placed}
        masters = division.has_masters
        start = {name: one.float() if masters and is_half(one.dtype) else one for name, one in values.items()}
        # What an engine has not divided, frozen tensors that is, only keeps its position.
        apart = {
            one.fqn: torch.zeros(one.shape, dtype=one.dtype, device="cpu")
            for one in held.placed
            if one.fqn not in start
        }
        self.reference = Reference(held.spec, division.groups, division.arguments, {**start, **apart})
        is_two_way = [held.spec.is_undescribed_in(group) for group in division.groups]
        self._values = GroupValues(self.reference.optimizer, is_two_way)

    def show(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these; a master stands, but for elements that somebody has changed in the model."""
        for name, given in weights.items():
            parameter = self.reference.parameters[name]
            is_same = parameter.data.to(given.dtype) == given
            parameter.data.copy_(torch.where(is_same, parameter.data, given.to(parameter.dtype)))

    def step(self, gradients: Mapping[str, Tensor], generators: Generators) -> dict[str, Tensor]:
        """The weights after one step, in the model's precision; random numbers are drawn as the run drew them."""
        self._values.push(self._groups, self._keys)
        with generators_kept():
            write_generators(generators)
            self.reference.step(gradients)
        self._values.published()
        return {name: one.data.to(self._dtypes[name]) for name, one in self.reference.parameters.items()}
