"""A param group that is added between steps: upstream takes it by its own ``add_param_group``, and goes on.

What is stepped already keeps its owner, its round and its state. What is new is dealt out by itself, into rounds of its
own; every instance of upstream gets the group, with ghosts for what others step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.errors import DistOptimError
from dist_optim.exchange.plan import Bucket, Plan
from dist_optim.ranks.agreement import own_rank
from dist_optim.ranks.together import together
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.division import SOLE_OWNER, Division, divide, starting_values
from dist_optim.stepping.edited_groups import parameters_of, why_edited
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["REMEDY", "Grown", "NewGroups", "grown", "why_fixed"]

REMEDY = (
    "Pass all groups when you build: build_optimizer(model, name, params=[{'params': [...]}, ...]). List what is "
    "frozen until later in them too: it has no state before its first gradient."
)


@dataclass(frozen=True, slots=True)
class Grown:
    """A new group, and the places of all parameters in the model, which may have grown too."""

    group: ParamGroup
    positions: Mapping[str, int]


class NewGroups(Protocol):
    """Where parameters are found, and values checked: see ``dist_optim.building.new_groups``."""

    def arranged(
        self, spec: OptimizerSpec, given: Mapping[str, Any], listed: set[int], shared_by: dist.ProcessGroup | None
    ) -> Grown:
        """The group with placed parameters and checked values. Raises on this rank alone."""


def why_fixed(held: Holdings) -> str:
    """Why this optimizer takes no group after it was built; empty where it does."""
    spec = held.spec
    if spec.is_undescribed and not held.division.is_together:
        return (
            f"{spec.name} is shared by several ranks, and how it takes new groups was not proven: build it with "
            "independent=False, so that one rank steps all. Or:"
        )
    takes = spec.driver.takes_groups_later
    if takes is None:
        takes = type(spec.driver).construct is UpstreamDriver.construct
    if not spec.is_undescribed:
        takes = takes and spec.own_class().add_param_group is Optimizer.add_param_group
    return "" if takes else f"{spec.name} arranges its groups when it is built."


def grown(held: Holdings, groups: Sequence[ParamGroup], new_groups: NewGroups, given: Mapping[str, Any]) -> Holdings:
    """What is held with one param group more. Collective.

    Args:
        held: As it is. Where a rank fails, it stays so.
        groups: The user's, as they are now.
        new_groups: Where the group is checked.
        given: The group.

    Raises:
        DistOptimError: On all ranks.
    """
    doing = "Adding a param group"

    def divided() -> tuple[Division, Division]:
        if problem := why_edited(held.members, groups):
            raise problem
        listed = {id(one.parameter) for one in held.placed}
        found = new_groups.arranged(held.spec, given, listed, held.process_group)
        new = _divided(held.division, found.group)
        return new, _extended(held.division, new, found.positions)

    new, division = together(divided, held.all_ranks, doing=doing)
    division.agree()
    values = starting_values(new)
    if values is not None:
        values = {index + len(held.placed): one for index, one in values.items()}
    try:
        local, owners = together(lambda: _instances(held, division, values), held.all_ranks, doing=doing)
    except DistOptimError:
        for instance in held.instances:
            instance.drop_groups(len(held.division.groups), len(held.placed))
        raise
    inner = (local or owners[0]).optimizer.param_groups[-1]
    kept = {key: value for key, value in inner.items() if key not in ("params", "param_names")}
    held.groups[:] = [*groups, {**kept, "params": parameters_of(division.groups[-1]["params"])}]
    return replace(
        held,
        placed=division.placed,
        plan=division.plan,
        local_instance=local,
        owner_instances=tuple(owners),
        division=division,
    )


def _divided(division: Division, group: ParamGroup) -> Division:
    """Who steps what of the new group, which is counted by itself here."""
    made = divide(
        division.spec,
        [group],
        division.arguments,
        process_group=division.process_group,
        all_ranks=division.all_ranks,
        bucket_bytes=division.bucket_bytes,
        replicates=division.replicates,
        master_weights=division.has_masters,
        by_stored_gradients=division.by_stored_gradients,
    )
    return replace(made, has_masters=division.has_masters)


def _extended(division: Division, new: Division, positions: Mapping[str, int]) -> Division:
    """Both as one: indices and rounds of the new one follow those of the old one."""
    first, num_rounds = len(division.placed), len(division.plan.buckets)
    groups = [
        {
            **group,
            "params": [replace(one, position=positions.get(one.fqn, one.position)) for one in group["params"]],
        }
        for group in division.groups
    ] + list(new.groups)
    buckets = tuple(_shifted(bucket, first, num_rounds) for bucket in new.plan.buckets)
    owners = {index + first: owner for index, owner in new.plan.owners.items()}
    return replace(
        division,
        groups=groups,
        placed=tuple(one for group in groups for one in group["params"]),
        slices=[*division.slices, *(index + first for index in new.slices)],
        plan=Plan({**division.plan.owners, **owners}, (*division.plan.buckets, *buckets)),
    )


def _shifted(bucket: Bucket, first: int, num_rounds: int) -> Bucket:
    owned = tuple(tuple(replace(item, index=item.index + first) for item in items) for items in bucket.owned)
    return replace(bucket, index=bucket.index + num_rounds, owned=owned)


def _instances(
    held: Holdings, division: Division, values: Mapping[int, Tensor] | None
) -> tuple[UpstreamInstance | None, list[UpstreamInstance]]:
    """Upstream's optimizers with the last group of ``division``, which ``held`` lacks: those of ``held``, and new ones.

    Args:
        held: As it was.
        division: With that group.
        values: What ``starting_values`` returned for the new group, by the indices of ``division``.
    """
    first, rank = len(held.placed), own_rank(division.process_group)
    slices = {index: division.placed[index].local().shape for index in division.slices if index >= first}
    rounds = division.plan.buckets[len(held.plan.buckets) :]
    shapes = [{item.index: item.shape for item in bucket.owned[rank]} for bucket in rounds]
    local, owners = held.local_instance, list(held.owner_instances)
    if slices and local is None:
        local = _fresh(held)
    adding: list[tuple[UpstreamInstance, dict[int, torch.Size]]] = [] if local is None else [(local, slices)]
    if division.is_together and owners:
        adding.append((owners[0], {k: v for own in shapes for k, v in own.items()} if rank == SOLE_OWNER else {}))
        owners += [owners[0]] * len(rounds)
    else:
        new = [_fresh(held) for _ in rounds]
        adding += [(instance, {}) for instance in owners] + list(zip(new, shapes, strict=True))
        owners += new
    for instance, own in adding:
        instance.add_group(division.spec, division.groups[-1], first, own, division.seen_by(own, values))
    return local, owners


def _fresh(held: Holdings) -> UpstreamInstance:
    """An instance that steps nothing of what is stepped already, and counts as the others do."""
    division = held.division
    values: dict[int, Tensor] | None = {} if division.keeps_tensors else None
    made = UpstreamInstance(division.spec, division.groups, {}, division.arguments, values)
    with torch.no_grad():
        made.group_values.write_counters(held.counters())
    return made
