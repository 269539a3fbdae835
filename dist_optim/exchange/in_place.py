"""A round on the host: messages between pairs of ranks, from where a part lies to where it is read.

gloo sends from any memory and receives into any: packing parts for one collective would copy each twice more. Small
parts are packed all the same, one message a pair of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.copies import copy, cut
from dist_optim.exchange.plan import Bucket, Item, Route
from dist_optim.exchange.rooms import Room
from dist_optim.exchange.route import Leg
from dist_optim.exchange.tasks import Task
from dist_optim.ranks.agreement import own_rank

__all__ = ["gather", "scatter"]

FIELDS = 4
"""More than ever travel together: gradients and parameters to owners, parameters back."""
BACK = FIELDS - 1
FIRST_TAG, FIRST_TAG_OF_PACKS = 1 << 29, 1 << 30
"""Of our messages: a message of the user's that is still on its way has a small one."""


def gather(
    bucket: Bucket,
    fields: Sequence[Mapping[int, Tensor]],
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room,
) -> Task[list[dict[int, Tensor]]]:
    """As ``gather_to_owner``, of sharded tensors on the host."""
    rank = own_rank(process_group)
    own = bucket.owned[rank]
    full = [room.tensors(own, bucket.dtype, bucket.device) for _ in fields]
    mail = _Mail(bucket, process_group, room)
    for leg in route.receives:
        for at, whole in enumerate(full):
            mail.receive(leg, at, {item.index: item.layout.view_of(whole[item.index], leg.peer) for item in _of(leg)})
    for leg in route.sends:
        for at, field in enumerate(fields):
            mail.send(leg, at, field)
    for field, whole in zip(fields, full, strict=True):
        copy([item.layout.view_of(whole[item.index], rank) for item in own], [field[item.index] for item in own])
    yield
    mail.wait()
    return full


def scatter(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room,
) -> Task[None]:
    """As ``scatter_from_owner``, on the host; of a replicated tensor every rank holds all."""
    rank = own_rank(process_group)
    own = bucket.owned[rank]
    whole = {item.index: full[item.index].contiguous() for item in own}
    mail = _Mail(bucket, process_group, room)
    for leg in route.back.sends:
        mail.receive(leg, BACK, local)
    for leg in route.back.receives:
        mail.send(leg, BACK, {item.index: item.layout.view_of(whole[item.index], leg.peer) for item in _of(leg)})
    if not bucket.is_replicated:
        copy([local[item.index] for item in own], [item.layout.view_of(whole[item.index], rank) for item in own])
    yield
    mail.wait()


def _of(leg: Leg) -> tuple[Item, ...]:
    return (*leg.in_place, *leg.packed)


class _Mail:
    """The messages of one round on one rank; each has a tag of its own, the same at both ends."""

    def __init__(self, bucket: Bucket, process_group: dist.ProcessGroup | None, room: Room) -> None:
        self._bucket = bucket
        self._group = process_group
        self._room = room
        self._works: list[Any] = []
        self._landing: list[tuple[Tensor, list[Tensor]]] = []

    def send(self, leg: Leg, field: int, parts: Mapping[int, Tensor]) -> None:
        """To the other rank of the leg, its parts of one field."""
        for item in leg.in_place:
            self._send(parts[item.index].contiguous(), leg.peer, FIRST_TAG + item.index * FIELDS + field)
        if leg.packed:
            buffer = self._room.flat(leg.packed_numel, self._bucket.dtype, self._bucket.device)
            small = [parts[item.index] for item in leg.packed]
            copy(cut(buffer, small), small)
            self._send(buffer, leg.peer, self._tag_of_packed(field))

    def receive(self, leg: Leg, field: int, parts: Mapping[int, Tensor]) -> None:
        """What ``send`` sends at the other end; it is there after ``wait``."""
        for item in leg.in_place:
            part = parts[item.index]
            if not part.is_contiguous():
                whole = self._room.flat(part.numel(), self._bucket.dtype, self._bucket.device)
                self._landing.append((whole, [part]))
                part = whole
            self._receive(part, leg.peer, FIRST_TAG + item.index * FIELDS + field)
        if leg.packed:
            buffer = self._room.flat(leg.packed_numel, self._bucket.dtype, self._bucket.device)
            self._landing.append((buffer, [parts[item.index] for item in leg.packed]))
            self._receive(buffer, leg.peer, self._tag_of_packed(field))

    def wait(self) -> None:
        """Until all has gone and come."""
        for work in self._works:
            work.wait()
        self._works.clear()
        for buffer, parts in self._landing:
            copy(parts, cut(buffer, parts))

    def _tag_of_packed(self, field: int) -> int:
        return FIRST_TAG_OF_PACKS + self._bucket.index * FIELDS + field

    def _send(self, tensor: Tensor, to: int, tag: int) -> None:
        self._works.append(dist.isend(tensor, group=self._group, group_dst=to, tag=tag))

    def _receive(self, tensor: Tensor, source: int, tag: int) -> None:
        self._works.append(dist.irecv(tensor, group=self._group, group_src=source, tag=tag))
