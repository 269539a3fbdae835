"""Who owns each tensor, and which tensors travel together: pure data, made once, without a process group.

**Owner**: the rank that steps a whole tensor with the upstream optimizer and keeps its state. Owners are dealt out
longest first; the load that is balanced is the worse of two shares, estimated time and elements, so that neither the
step time nor the state bytes pile up on one rank.

**Bucket**: the tensors of one round. In a round every owner takes about the same number of elements, so that each
collective is balanced; a bucket has one dtype and one device, and its tensors are all replicated or all sharded.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_optim.layouts.layout import Layout, numel_on

__all__ = ["Bucket", "Item", "Plan", "assign_owners", "make_plan"]


HOME_SHARE = 0.75
"""A rank that stores at least this part of a sharded tensor owns it: more than any even cut of two rows leaves."""

_Kind = tuple[bool, torch.dtype, torch.device]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor as the planner sees it. ``index`` is its position among all parameters of the optimizer."""

    index: int
    shape: torch.Size
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    cost: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel in one round: ``owned[rank]`` are the ones that ``rank`` steps, in travelling order."""

    index: int
    owned: tuple[tuple[Item, ...], ...]
    is_replicated: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def items(self) -> tuple[Item, ...]:
        """All tensors of the bucket, owner by owner."""
        return tuple(item for items in self.owned for item in items)

    def without(self, absent: set[int]) -> Bucket:
        """The same bucket less the tensors with these indices (those that have no gradient in this step)."""
        owned = tuple(tuple(item for item in items if item.index not in absent) for items in self.owned)
        return dataclasses.replace(self, owned=owned)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor's owner, and the buckets in travelling order."""

    owners: dict[int, int]
    buckets: tuple[Bucket, ...]


def make_plan(items: Sequence[Item], world_size: int, bucket_numel: int) -> Plan:
    """Deal the tensors out to owners and cut the rounds.

    Deterministic in its arguments: ranks that describe the same model make the same plan.

    Args:
        items: The tensors that need an owner, in parameter order.
        world_size: Ranks to deal to.
        bucket_numel: Elements that one owner takes in one round; a larger tensor has a round of its own.
    """
    held = [[numel_on(item.layout, item.shape, rank) for rank in range(world_size)] for item in items]
    owners = dict(zip([item.index for item in items], assign_owners(items, world_size, held), strict=True))
    queues: dict[_Kind, list[deque[Item]]] = defaultdict(lambda: [deque() for _ in range(world_size)])
    for item in items:
        kind = (item.layout.is_replicated, item.dtype, item.device)
        queues[kind][owners[item.index]].append(item)
    buckets: list[Bucket] = []
    for (is_replicated, dtype, device), by_owner in queues.items():
        while any(by_owner):
            owned = tuple(_take(queue, bucket_numel) for queue in by_owner)
            buckets.append(Bucket(len(buckets), owned, is_replicated, dtype, device))
    return Plan(owners, tuple(buckets))


def assign_owners(items: Sequence[Item], world_size: int, held: Sequence[Sequence[int]] = ()) -> list[int]:
    """An owner for each item: longest first, each to the rank whose worse share (time or elements) stays smallest.

    Args:
        items: The tensors to deal out.
        world_size: Ranks to deal to.
        held: Elements of each item that each rank stores. A tensor that lies (almost) whole on one rank is stepped
            there, since nothing then has to travel: ZeRO-1/2 and FSDP1 store most tensors so.
    """
    total_cost = sum(item.cost for item in items) or 1.0
    total_numel = sum(item.shape.numel() for item in items) or 1
    shares = [(item.cost / total_cost, item.shape.numel() / total_numel) for item in items]
    loads = [(0.0, 0.0)] * world_size
    owners = [0] * len(items)
    homes = [_home(item, parts) for item, parts in zip(items, held, strict=True)] if held else [None] * len(items)
    for at in sorted(range(len(items)), key=lambda at: (homes[at] is None, -max(shares[at]), at)):
        time, size = shares[at]
        owner = homes[at]
        if owner is None:
            owner = min(
                range(world_size), key=lambda r: (max(loads[r][0] + time, loads[r][1] + size), sum(loads[r]), r)
            )
        owners[at] = owner
        loads[owner] = (loads[owner][0] + time, loads[owner][1] + size)
    return owners


def _home(item: Item, held: Sequence[int]) -> int | None:
    """The rank that stores almost all of a sharded tensor, where there is one."""
    if item.layout.is_replicated or max(held) < HOME_SHARE * item.shape.numel():
        return None
    return max(range(len(held)), key=lambda rank: held[rank])


def split_sizes(bucket: Bucket, rank: int) -> tuple[list[int], list[int]]:
    """Elements that ``rank`` sends to each owner, and receives from each holder, when a sharded bucket is gathered.

    The way back is the way there, inverted: scattering uses the same two lists swapped.
    """
    to_owners = [sum(numel_on(item.layout, item.shape, rank) for item in items) for items in bucket.owned]
    own = bucket.owned[rank]
    from_holders = [
        sum(numel_on(item.layout, item.shape, holder) for item in own) for holder in range(len(bucket.owned))
    ]
    return to_owners, from_holders


def _take(queue: deque[Item], bucket_numel: int) -> tuple[Item, ...]:
    taken: list[Item] = []
    numel = 0
    while queue and (not taken or numel + queue[0].shape.numel() <= bucket_numel):
        numel += queue[0].shape.numel()
        taken.append(queue.popleft())
    return tuple(taken)
