"""Host reads, tried: who follows when what is read of one tensor is changed?

A value that Python holds carries no tag. So a run is repeated in which every read of some tensors returns something
else; the others may not move otherwise. The tensors are parted by each bit of their number, both ways, so that every
pair is parted once in each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dist_optim.proving.flow import Flow, flow_of
from dist_optim.proving.scenario import Scenario
from dist_optim.proving.subject import Context
from dist_optim.proving.trace import numbers
from dist_optim.specs.registry import OptimizerSpec

__all__ = ["who_follows"]

AFTER = 20
"""Steps that a run goes on after the last place of the code that reads was first reached."""


def stretched(value: Any) -> Any:
    """A little more; the opposite of a truth."""
    if isinstance(value, bool):
        return not value
    return value * 1.5 + 0.25 if isinstance(value, float) else value + 1 if isinstance(value, int) else value


def huge(value: Any) -> Any:
    """So much that bounds bind."""
    return True if isinstance(value, bool) else 1e12 * value + 1 if isinstance(value, float) else value


def nothing(value: Any) -> Any:
    """Zero, or no."""
    return type(value)(0) if isinstance(value, (bool, int, float)) else value


PERTURBATIONS: tuple[Callable[[Any], Any], ...] = (stretched, huge, nothing)


def who_follows(
    spec: OptimizerSpec, scenario: Scenario, arguments: Mapping[str, Any], flow: Flow, around_step: Context
) -> str:
    """What changes with a value read of another tensor; empty where nothing does.

    All are tried up to where each place that reads has been reached, then half of the tensors over the whole schedule.

    Args:
        spec: Of the class.
        scenario: What is tried.
        arguments: Constructor keywords.
        flow: The traced run as it is, with snapshots.
        around_step: A context for each step.
    """
    count, last = len(scenario.placed), max(flow.snapshots)
    short = min(last, max(flow.found.first_read.values()) + AFTER)
    partings = _partings(count)
    tries = [(tags, perturb, short) for perturb in PERTURBATIONS for tags in partings]
    tries += [(tags, stretched, last) for tags in partings[1:2]]  # of those with an even number, the first among them
    num_shown = 0
    for tags, perturb, until in tries:
        checkpoints = [at for at in flow.snapshots if at <= until] or [min(flow.snapshots)]
        compared = _Comparison(flow, [index for index in range(count) if not tags >> index & 1])
        changed = flow_of(
            spec,
            scenario,
            arguments,
            checkpoints,
            perturb=(tags, perturb),
            around_step=around_step,
            is_enough=compared.differs,
        )
        if compared.difference:
            return f"{compared.difference}, after what is read of tensors {numbers(tags)} was changed"
        if changed.found.coupled:
            return changed.found.coupled[0]
        if changed.found.draws:
            return f"draws {changed.found.draws}"
        num_shown += len(changed.snapshots)
    return "" if num_shown or not tries else "it fails wherever what it reads is changed"


class _Comparison:
    """A perturbed run beside the one that was not."""

    def __init__(self, flow: Flow, others: list[int]) -> None:
        self._flow, self._others = flow, others
        self.difference = ""

    def differs(self, changed: Flow, at: int) -> bool:
        """Whether tensors whose reads were left alone have moved otherwise by this step, or a value of a group has."""
        difference = changed.snapshots[at].first_difference(self._flow.snapshots[at], self._others)
        if difference:
            where = " and ".join(list(self._flow.found.reads)[:2])
            self.difference = f"{difference} differs by step {at}, following what is read at {where}"
        return bool(difference)


def _partings(count: int) -> list[int]:
    """Sets of tensors, as tags: by each bit of their numbers, those that have it and those that do not."""
    every = (1 << count) - 1
    found: list[int] = []
    for bit in range(max(1, (count - 1).bit_length())):
        having = sum(1 << index for index in range(count) if index >> bit & 1)
        found += [having, every & ~having]
    return [tags for tags in found if tags and tags != every]
