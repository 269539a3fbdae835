"""What one rank sends and receives in a round: pure data, frozen with the plan.

**Route**: how many elements one rank sends to each owner and receives from each holder. The way back is the same route,
read the other way.

**Leg**: what goes between this rank and one other. A part that lies together in the memory of the full tensor, and is
large, travels *in place*: from where it lies to where it is read, without a buffer. The others are *packed* into one
message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dist_optim.layouts.layout import Layout

__all__ = ["IN_PLACE_BYTES", "Item", "Leg", "Route", "is_large", "route_of"]

IN_PLACE_BYTES = 32 << 10
"""Parts of at least so many bytes travel in place: a message costs as much as copying about so many twice."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor as the planner sees it. ``index`` is its position among all parameters of the optimizer."""

    index: int
    shape: torch.Size
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    cost: float
    is_idle: bool = False
    """Frozen for now: dealt out after all others, and in rounds of its own."""


@dataclass(frozen=True, slots=True)
class Leg:
    """Parts of tensors that go from one rank to another, in travelling order."""

    peer: int
    """The other rank."""
    in_place: tuple[Item, ...]
    packed: tuple[Item, ...]
    packed_numel: int
    """Elements of the packed parts of one field."""


@dataclass(frozen=True, slots=True)
class Route:
    """What one rank moves in a round, of one field (the gradients, say)."""

    to_owners: tuple[int, ...]
    """Elements of what it holds that go to each owner."""
    from_holders: tuple[int, ...]
    """Elements of what it owns that come from each rank."""
    sends: tuple[Leg, ...]
    """What it holds of the tensors of other owners."""
    receives: tuple[Leg, ...]
    """What others hold of the tensors that it owns."""
    to_all_holders: Route | None = None
    """Where several ranks hold the same part: one of them sends it, and on the way back each gets it."""

    @property
    def back(self) -> Route:
        """What goes the other way."""
        return self.to_all_holders or self


def route_of(owned: Sequence[Sequence[Item]], rank: int, itemsize: int) -> Route:
    """The route of ``rank`` in a round in which ``owned[owner]`` go to each owner.

    Args:
        owned: Of each rank, in travelling order.
        rank: Whose route.
        itemsize: Bytes of an element.
    """
    own = owned[rank]
    to_owners = [[item.layout.numel_on(item.shape, rank) for item in items] for items in owned]
    from_holders = [
        [item.layout.numel_on(item.shape, holder) for item in own] if own else [] for holder in range(len(owned))
    ]
    everything = _route(owned, rank, itemsize, to_owners, from_holders)
    if not any(item.layout.copies > 1 for items in owned for item in items):
        return everything
    to_owners = [
        [numel if item.layout.is_read(rank, owner) else 0 for item, numel in zip(items, numels, strict=True)]
        for owner, (items, numels) in enumerate(zip(owned, to_owners, strict=True))
    ]
    from_holders = [
        [numel if item.layout.is_read(holder, rank) else 0 for item, numel in zip(own, numels, strict=True)]
        for holder, numels in enumerate(from_holders)
    ]
    return replace(_route(owned, rank, itemsize, to_owners, from_holders), to_all_holders=everything)


def _route(
    owned: Sequence[Sequence[Item]],
    rank: int,
    itemsize: int,
    to_owners: Sequence[Sequence[int]],
    from_holders: Sequence[Sequence[int]],
) -> Route:
    return Route(
        tuple(map(sum, to_owners)),
        tuple(map(sum, from_holders)),
        tuple(_legs(((owner, owned[owner], numels) for owner, numels in enumerate(to_owners)), rank, itemsize)),
        tuple(_legs(((holder, owned[rank], numels) for holder, numels in enumerate(from_holders)), rank, itemsize)),
    )


def is_large(numel: int, itemsize: int) -> bool:
    """Whether so many elements travel in place, where they lie together."""
    return numel * itemsize >= IN_PLACE_BYTES


def _legs(parts: Iterable[tuple[int, Sequence[Item], Sequence[int]]], rank: int, itemsize: int) -> Iterable[Leg]:
    for peer, items, numels in parts:
        if peer == rank or not any(numels):
            continue
        in_place, packed, packed_numel = [], [], 0
        for item, numel in zip(items, numels, strict=True):
            if item.layout.is_contiguous and is_large(numel, itemsize):
                in_place.append(item)
            elif numel:
                packed.append(item)
                packed_numel += numel
        yield Leg(peer, tuple(in_place), tuple(packed), packed_numel)
