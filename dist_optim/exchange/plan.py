"""Who owns each tensor, and which tensors travel together: pure data, made once, without a process group.

**Owner**: the rank that steps a whole tensor with the upstream optimizer and keeps its state. Owners are dealt out
longest first; the load that is balanced is the worse of two shares, estimated time and elements, so that neither the
step time nor the state bytes pile up on one rank.

**Bucket**: the tensors of one round. In a round every owner takes about the same number of elements, so that each
collective is balanced; a bucket has one dtype and one device, and its tensors are all replicated or all sharded.

``print(plan)`` shows every byte that will travel. Planning takes O(tensors x log ranks).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from dist_optim.exchange.route import Item, Route, route_of

__all__ = ["Bucket", "Item", "Plan", "Route", "assign_owners", "make_plan"]


HOME_SHARE = 0.75
"""A rank that stores at least this part of a sharded tensor owns it: more than any even cut of two rows leaves."""

_Kind = tuple[bool, torch.dtype, torch.device, bool]


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

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensors of the round."""
        return self.dtype.itemsize * sum(item.shape.numel() for item in self.items)

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffer that the fullest rank takes for one field of the round.

        The updated parameters of all owners where the tensors are replicated, the tensors that it owns where not.
        """
        if self.is_replicated:
            return self.nbytes
        return self.dtype.itemsize * max(sum(item.shape.numel() for item in items) for items in self.owned)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of one field that go from a rank to another on the way to the owners."""
        if self.is_replicated:
            return 0
        return self.dtype.itemsize * sum(
            item.shape.numel() - item.layout.numel_on(item.shape, owner)
            for owner, items in enumerate(self.owned)
            for item in items
        )

    @property
    def scattered_bytes(self) -> int:
        """Bytes of the updated parameters that go from a rank to another on the way back."""
        if self.is_replicated:
            return self.nbytes * (len(self.owned) - 1)
        copies = sum((item.layout.copies - 1) * item.shape.numel() for item in self.items)
        return self.gathered_bytes + self.dtype.itemsize * copies

    def only(self, indices: Collection[int]) -> Bucket:
        """The same bucket with no other tensors than these: what has a gradient, or is ready, in this step."""
        owned = tuple(tuple(item for item in items if item.index in indices) for items in self.owned)
        return dataclasses.replace(self, owned=owned)

    def route(self, rank: int) -> Route:
        """What ``rank`` sends and receives."""
        return route_of(self.owned, rank, self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor's owner, and the buckets in travelling order."""

    owners: dict[int, int]
    buckets: tuple[Bucket, ...]

    def __str__(self) -> str:
        """Round by round: what is in it, what travels, and what the fullest rank holds."""
        num_ranks = len(self.buckets[0].owned) if self.buckets else 0
        lines = [f"{len(self.owners)} tensors owned by {num_ranks} ranks, in {len(self.buckets)} rounds"]
        for bucket in self.buckets:
            lines.append(
                f"  round {bucket.index}: {len(bucket.items)} {'replicated' if bucket.is_replicated else 'sharded'} "
                f"tensors of {bucket.dtype}, {bucket.nbytes:,} bytes; gradients to owners {bucket.gathered_bytes:,}, "
                f"parameters to owners {bucket.gathered_bytes:,}, parameters back {bucket.scattered_bytes:,}; "
                f"a buffer of {bucket.held_bytes:,} on the fullest rank"
            )
        return "\n".join(lines)


def make_plan(items: Sequence[Item], world_size: int, bucket_bytes: int, sole_owner: int | None = None) -> Plan:
    """Deal the tensors out to owners and cut the rounds.

    Deterministic in its arguments: ranks that describe the same model make the same plan.

    Args:
        items: The tensors that need an owner, in parameter order.
        world_size: Ranks to deal to.
        bucket_bytes: The most that a rank's buffer for one field of a round takes, at any number of ranks; a larger
            tensor has a round of its own.
        sole_owner: The rank that owns everything, where tensors are not dealt out.
    """
    dealt = assign_owners(items, world_size) if sole_owner is None else [sole_owner] * len(items)
    owners = dict(zip([item.index for item in items], dealt, strict=True))
    queues: dict[_Kind, dict[int, deque[Item]]] = defaultdict(lambda: defaultdict(deque))
    for item in items:
        kind = item.layout.is_replicated, item.dtype, item.device, item.is_idle
        queues[kind][owners[item.index]].append(item)
    buckets: list[Bucket] = []
    for (is_replicated, dtype, device, _), by_owner in queues.items():
        bucket_numel = bucket_bytes // dtype.itemsize
        while by_owner:
            # Replicated tensors come back into one buffer on every rank, sharded ones into a buffer of their owner.
            taken = _take_shared(by_owner, bucket_numel) if is_replicated else _take_each(by_owner, bucket_numel)
            owned = tuple(tuple(taken.get(rank, ())) for rank in range(world_size))
            buckets.append(Bucket(len(buckets), owned, is_replicated, dtype, device))
            for owner in [owner for owner, queue in by_owner.items() if not queue]:
                del by_owner[owner]
    return Plan(owners, tuple(buckets))


def assign_owners(items: Sequence[Item], world_size: int) -> list[int]:
    """An owner for each item: longest first, each to the rank whose worse share (time or elements) is smallest.

    A tensor that lies (almost) whole on one rank is stepped there, since nothing then has to travel: ZeRO-1/2 and FSDP1
    store most tensors so. Idle tensors go on top of the balance of the others, which they do not move.

    Args:
        items: The tensors to deal out.
        world_size: Ranks to deal to.
    """
    counted = [item for item in items if not item.is_idle] or items
    total_cost = sum(item.cost for item in counted) or 1.0
    total_numel = sum(item.shape.numel() for item in counted) or 1
    shares = [(item.cost / total_cost, item.shape.numel() / total_numel) for item in items]
    owners = [0] * len(items)
    time, size = [0.0] * world_size, [0.0] * world_size
    for is_idle in (False, True):
        homes = {at: _homes(item) for at, item in enumerate(items) if item.is_idle is is_idle}
        _deal_out(homes, shares, owners, time, size)
    return owners


def _deal_out(
    homes: dict[int, Sequence[int]],
    shares: Sequence[tuple[float, float]],
    owners: list[int],
    time: list[float],
    size: list[float],
) -> None:
    """Give the tensors at these places their owners, and the owners' loads what they weigh."""

    def load(rank: int) -> tuple[float, float, int]:
        return max(time[rank], size[rank]), time[rank] + size[rank], rank

    for at, ranks in homes.items():
        if ranks:
            home = min(ranks, key=load)
            owners[at] = home
            time[home], size[home] = time[home] + shares[at][0], size[home] + shares[at][1]
    lightest = [load(rank) for rank in range(len(time))]
    heapq.heapify(lightest)
    for at in sorted((at for at, ranks in homes.items() if not ranks), key=lambda at: (-max(shares[at]), at)):
        owner = lightest[0][2]
        owners[at] = owner
        time[owner], size[owner] = time[owner] + shares[at][0], size[owner] + shares[at][1]
        heapq.heapreplace(lightest, load(owner))


def _homes(item: Item) -> Sequence[int]:
    """The rank that stores almost all of a sharded tensor, where there is one, and its replicas."""
    if item.layout.is_replicated or not item.shape.numel():
        return ()
    rank = item.layout.home(item.shape)
    is_home = item.layout.numel_on(item.shape, rank) >= HOME_SHARE * item.shape.numel()
    return item.layout.holders(rank) if is_home else ()


def _take_each(by_owner: dict[int, deque[Item]], bucket_numel: int) -> dict[int, list[Item]]:
    """Up to so many elements from each owner's queue; a larger tensor alone."""
    return {owner: _take(queue, bucket_numel, bucket_numel) for owner, queue in by_owner.items()}


def _take_shared(by_owner: dict[int, deque[Item]], bucket_numel: int) -> dict[int, list[Item]]:
    """Up to so many elements from all queues together, about equally many from each; a larger tensor alone."""
    taken: dict[int, list[Item]] = {}
    left = {owner: sum(item.shape.numel() for item in queue) for owner, queue in by_owner.items()}
    share, room = -(-bucket_numel // len(by_owner)), bucket_numel
    for owner in sorted(by_owner, key=lambda owner: (-left[owner], owner)):
        if room < bucket_numel and by_owner[owner][0].shape.numel() > room:
            continue
        taken[owner] = _take(by_owner[owner], min(share, room), room)
        room -= sum(item.shape.numel() for item in taken[owner])
    return taken


def _take(queue: deque[Item], share: int, room: int) -> list[Item]:
    """At least one item; more while all together stay within the share."""
    taken = [queue.popleft()]
    numel = taken[0].shape.numel()
    while queue and numel + queue[0].shape.numel() <= min(share, room):
        numel += queue[0].shape.numel()
        taken.append(queue.popleft())
    return taken
