"""What is known of an optimizer's steps without taking one: coverage, bytes that travel, projections that are due."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.specs.composed import OPTIM, ComposedSpec
from dist_optim.specs.registry import Trait
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["coverage", "coverage_of", "exchanged_bytes", "parts_of", "projections_due"]

RANK, GAP = "rank", "update_proj_gap"
"""Keys of groups that are stepped in a low-rank space, and of how often their projections are made anew."""


def parts_of(optimizer: Any) -> list[DistributedOptimizer]:
    """What steps: the optimizer itself, or under DeepSpeed one for each call of a training step."""
    return [optimizer] if isinstance(optimizer, DistributedOptimizer) else optimizer.parts()


def coverage_of(optimizer: Any) -> float:
    """``coverage`` of an optimizer, under DeepSpeed too: each of its parts knows the whole model."""
    return coverage(parts_of(optimizer)[0].holdings)


def coverage(held: Holdings) -> float:
    """The share of trained elements that the named algorithm itself steps: by its low-rank groups, or not by a rest."""
    members = list(_members(held))
    covered = sum(one.shape.numel() for group, one in members if _is_covered(held, group))
    return covered / max(1, sum(one.shape.numel() for _, one in members))


def _members(held: Holdings) -> Iterator[tuple[dict[str, object], PlacedParameter]]:
    for group in held.division.groups:
        for one in group["params"]:
            if one.is_trained:
                yield group, one


def _is_covered(held: Holdings, group: dict[str, object]) -> bool:
    spec = held.spec
    if isinstance(spec, ComposedSpec):
        return group[OPTIM] == next(iter(spec.parts))
    return RANK in group or Trait.LOW_RANK not in spec.traits


def exchanged_bytes(held: Holdings) -> int:
    """Bytes that one step sends between the ranks of a shard group, all together, where every tensor has a gradient."""
    return sum(2 * bucket.gathered_bytes + bucket.scattered_bytes for bucket in held.plan.buckets)


def projections_due(held: Holdings, num_steps: int) -> int:
    """How many projections the step after so many makes anew."""
    return sum(
        sum(one.is_trained for one in members)
        for group, members in zip(held.groups, held.members, strict=True)
        if RANK in group and group.get(GAP) and num_steps % int(group[GAP]) == 0
    )
