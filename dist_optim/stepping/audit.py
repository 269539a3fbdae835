"""The route audit: which algorithm got which tensors, and who steps them, as text for people to check before step 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Elsewhere, Replicated
from dist_optim.ranks.agreement import num_ranks
from dist_optim.specs.hyperparameters import Scope
from dist_optim.specs.registry import Trait
from dist_optim.stepping.division import is_half
from dist_optim.stepping.holdings import Holdings

__all__ = ["route_audit"]

MAX_SHAPES = 6
MAX_RANKS = 16
"""The most owners that are listed one by one."""
UNEVEN = 1.5
"""An owner with so many times the mean of all is told."""


def route_audit(held: Holdings, *, is_inside_backward: bool = False) -> str:
    """One line a param group (algorithm, tensors, elements, bytes, logical shapes), then each owner's share."""
    world_size = num_ranks(held.all_ranks)
    lines = [f"dist_optim: {held.spec.name} on {world_size} rank{'s' if world_size > 1 else ''}"]
    matrix_keys = set(held.spec.in_scope(Scope.MATRIX))
    for number, (group, members) in enumerate(zip(held.groups, held.members, strict=True)):
        trained = [member for member in members if member.is_trained]
        route = f"low rank {group['rank']}" if matrix_keys and "rank" in group else "full rank"
        route = f"{group['optim']}, {route}" if "optim" in group else route
        lines.append(
            f"  group {number} ({route}, lr {_number(group.get('lr'))}, weight decay "
            f"{_number(group.get('weight_decay'))}): {_describe(trained)}"
        )
        if len(trained) < len(members):
            lines[-1] += f"; {len(members) - len(trained)} frozen"
        if idle := sum(member.is_idle for member in members):
            lines[-1] += f"; {idle} of these tensors frozen for now"
    lines += _precision_lines(held)
    lines += _together_lines(held, world_size) or _owner_lines(held)
    if is_inside_backward:
        lines.append("  updates are made inside backward: each gradient is freed when it is applied")
    elif Trait.FUSED_BACKWARD in held.spec.traits:
        lines.append("  gradients are stored until step(), as for other optimizers")
    return "\n".join(lines)


def _number(value: Any) -> str:
    """A hyperparameter in few digits; some optimizers choose their own learning rate and have none."""
    return "none" if value is None else f"{float(value):g}"


def _describe(members: Sequence[PlacedParameter]) -> str:
    numel = sum(member.shape.numel() for member in members)
    nbytes = sum(member.shape.numel() * member.dtype.itemsize for member in members)
    shapes = Counter("x".join(map(str, member.shape)) or "scalar" for member in members)
    listing = ", ".join(f"{count} of {shape}" for shape, count in shapes.most_common(MAX_SHAPES))
    more = ", ..." if len(shapes) > MAX_SHAPES else ""
    return f"{len(members)} tensors, {numel:,} elements, {format_bytes(nbytes)} ({listing}{more})"


def _precision_lines(held: Holdings) -> list[str]:
    """Of weights in half precision: an update below their resolution is lost, unless something keeps it."""
    half = [one for one in held.placed if one.is_trained and is_half(one.dtype)]
    if held.division.has_masters:
        nbytes = 4 * sum(one.shape.numel() for one in half)
        return [
            f"  fp32 masters of {len(half)} tensors, with the ranks that step them: {format_bytes(nbytes)} together"
        ]
    if not half or held.spec.driver.keeps_precision({**held.division.arguments}):
        return []
    name, resolution = ("bfloat16", 256) if half[0].dtype == torch.bfloat16 else ("float16", 2048)
    return [
        f"  careful: {len(half)} tensors are stepped in {name}, where an update below 1/{resolution} of a weight is "
        "lost; master_weights=True keeps fp32 masters"
    ]


def _together_lines(held: Holdings, world_size: int) -> list[str]:
    """Where one rank steps everything: why, and what that takes there."""
    if not held.division.is_together or world_size == 1:
        return []
    verdict = held.spec.verdict
    reason = verdict.reason if verdict else "its tensors depend on each other"
    trained = [one for one in held.placed if one.is_trained]
    nbytes = sum(one.shape.numel() * one.dtype.itemsize for one in trained)
    return [
        f"  stepped together by rank 0, exact and not sharded: {reason.rstrip('.')}",
        f"  rank 0 holds all of its state, and in a step {format_bytes(nbytes)} of parameters and as much of gradients",
    ]


def _owner_lines(held: Holdings) -> list[str]:
    placed = held.placed
    lines = _share_lines(held)
    if held.num_replicas > 1:
        lines.append(
            f"  the {held.num_replicas} replicas of the shards all step the same: repeated work; with fully_shard, "
            "or FSDP1, on a 2-D mesh of rising ranks they share it"
        )
    if held.spec.verdict is not None and len(held.plan.buckets) and len(held.plan.buckets[0].owned) > 1:
        lines.append(f"  each tensor by itself: {held.spec.verdict.reason.rstrip('.')}")
    trainable = [p for p in placed if p.is_trained]
    local = [p for i, p in enumerate(placed) if p.is_trained and i not in held.plan.owners]
    alike = [p for p in local if p.layout.is_replicated and held.division.replicates]
    if cut := len(local) - len(alike):
        lines.append(f"  stepped on local slices: {cut} of {len(trainable)} tensors")
    if alike:
        lines.append(f"  stepped by every rank alike, state and all: {len(alike)} of {len(trainable)} tensors")
    return lines


def _share_lines(held: Holdings) -> list[str]:
    """How evenly whole tensors are dealt out: rank by rank, or where there are many heaviest, lightest and mean."""
    num_owners = len(held.plan.buckets[0].owned) if held.plan.buckets else 1
    tensors: dict[int, list[PlacedParameter]] = {rank: [] for rank in range(num_owners)}
    for index, owner in held.plan.owners.items():
        if not held.placed[index].is_idle:
            tensors[owner].append(held.placed[index])
    owned = {rank: sum(one.shape.numel() for one in own) for rank, own in tensors.items()}
    total = sum(owned.values())
    if not total or num_owners == 1:
        return []

    def share(rank: int) -> str:
        return f"rank {rank} {len(tensors[rank])} tensors, {owned[rank] / total:.1%}"

    heaviest, lightest = max(owned, key=lambda rank: owned[rank]), min(owned, key=lambda rank: owned[rank])
    if num_owners <= MAX_RANKS:
        shares = "; ".join(share(rank) for rank, own in tensors.items() if own)
    else:
        shares = (
            f"heaviest {share(heaviest)}; lightest {share(lightest)}; mean of {num_owners} ranks {1 / num_owners:.1%}"
        )
    lines = [f"  stepped whole by their owners, in {len(held.plan.buckets)} rounds: {shares}"]
    on_slices = sum(
        one.shape.numel()
        for at, one in enumerate(held.placed)
        if one.is_trained and at not in held.plan.owners and not isinstance(one.layout, Replicated | Elsewhere)
    )
    times = (owned[heaviest] * num_owners + on_slices) / (total + on_slices)
    if times > UNEVEN:
        largest = max(tensors[heaviest], key=lambda one: one.shape.numel())
        lines.append(
            f"  careful: rank {heaviest} steps {times:.1f} times the mean (its largest is {largest.fqn!r}, "
            f"{largest.shape.numel() / total:.1%}), and the others wait for it: tensors are stepped whole, or where "
            "they are stored. Fewer ranks to a shard group (HSDP) divide them better"
        )
    return lines


def format_bytes(count: int) -> str:
    """Bytes in the unit that suits their size."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
