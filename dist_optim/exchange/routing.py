"""Which way each parameter takes: stepped on local slices, or whole at an owner; decided once, on logical shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from dist_optim.errors import UnsupportedError
from dist_optim.exchange.plan import Item, Plan, make_plan
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import num_ranks
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["plan_owners", "refuse_misfits", "runs_on_local_slices"]

MAX_NAMES = 8


def runs_on_local_slices(
    spec: OptimizerSpec,
    placed: PlacedParameter,
    values: Mapping[str, Any],
    replicates: bool = False,
    master_weights: bool = False,
) -> bool:
    """Whether this rank steps its slice of the parameter by itself, with these hyperparameters.

    Args:
        spec: The optimizer.
        placed: The parameter.
        values: Its hyperparameters.
        replicates: Whether all ranks that hold a parameter whole step it alike.
        master_weights: Whether an fp32 copy is stepped in place of half precision.
    """
    is_elementwise = Trait.ELEMENTWISE in spec.traits and spec.driver.runs_on_slices(values, placed.device)
    if placed.layout.is_replicated:
        return replicates and is_elementwise
    # torch's CPU kernels round half precision once in a full SIMD vector, but after each operation in the tail: an
    # element's result depends on where a slice ends.
    rounds_by_position = placed.device.type == "cpu" and placed.dtype.itemsize < 4 and not master_weights
    return not rounds_by_position and (is_elementwise or _runs_on_rows(spec, placed, values))


def _runs_on_rows(spec: OptimizerSpec, placed: PlacedParameter, values: Mapping[str, Any]) -> bool:
    if Trait.BLOCKWISE not in spec.traits or placed.member is not None or len(placed.shape) < 2:
        return False
    fewest = placed.layout.fewest_rows(placed.shape[0])
    return fewest is not None and fewest > 0 and spec.driver.runs_on_rows(placed.shape, fewest, values)


def refuse_misfits(
    spec: OptimizerSpec, members: Sequence[tuple[PlacedParameter, Mapping[str, Any]]], is_divided: bool
) -> None:
    """Refuse parameters that upstream cannot step, each with the hyperparameters that it would get.

    Args:
        spec: The optimizer.
        members: Parameters, with their hyperparameters.
        is_divided: Whether several ranks step them.

    Raises:
        UnsupportedError: Naming the parameters and upstream's reason.
    """
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for placed, values in members:
        reason = spec.driver.why_refused(placed.shape, placed.dtype, placed.device, values)
        if is_divided:
            reason = reason or spec.driver.why_not_divided(placed.dtype, values)
        if reason:
            names_by_reason[reason].append(placed.fqn)
    for reason, names in names_by_reason.items():
        listing = ", ".join(map(repr, names[:MAX_NAMES])) + (", ..." if len(names) > MAX_NAMES else "")
        noun = "parameter" if len(names) == 1 else f"{len(names)} parameters"
        raise UnsupportedError(f"{spec.name}, {noun} {listing}: {reason}")


def plan_owners(
    spec: OptimizerSpec,
    members: Mapping[int, tuple[PlacedParameter, Mapping[str, Any]]],
    bucket_bytes: int,
    process_group: dist.ProcessGroup | None,
    sole_owner: int | None = None,
    world_size: int | None = None,
) -> Plan:
    """Owners and rounds of the parameters that are stepped whole, given by position; one rank's, where one is named.

    ``world_size`` stands for a process group that is not there.
    """
    items, world_size = [], num_ranks(process_group) if world_size is None else world_size
    for index, (placed, values) in members.items():
        cost = spec.driver.step_cost(placed.shape, values)
        is_idle = placed.is_idle and world_size > 1
        items.append(Item(index, placed.shape, placed.layout, placed.dtype, placed.device, cost, is_idle))
    # One process has nothing to overlap: all in one round.
    return make_plan(items, world_size, bucket_bytes if world_size > 1 else 1 << 62, sole_owner)
