"""A round on an accelerator, or among many ranks: parts packed for one collective, and unpacked behind it.

A buffer that a collective reads or writes is a local of its generator until ``work.wait()`` has returned, and the work
itself holds it too: a generator that is dropped half way, because another one failed, frees nothing that is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.copies import copy, cut, write_back
from dist_optim.exchange.plan import Bucket, Route
from dist_optim.exchange.tasks import Task
from dist_optim.ranks.agreement import own_rank

__all__ = ["gather", "gather_single", "scatter", "spread"]

# torch 2.13 renamed the collective.
gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather tensors of equal size into one."""


def gather(
    bucket: Bucket, fields: Sequence[Mapping[int, Tensor]], route: Route, process_group: dist.ProcessGroup | None
) -> Task[list[dict[int, Tensor]]]:
    """As ``gather_to_owner``, of sharded tensors: one all-to-all for all fields."""
    own = bucket.owned[own_rank(process_group)]
    to_owners, from_holders = ([len(fields) * n for n in sizes] for sizes in (route.to_owners, route.from_holders))
    send = _pack([field[item.index] for items in bucket.owned for field in fields for item in items], bucket)
    received = torch.empty(sum(from_holders), dtype=bucket.dtype, device=bucket.device)
    work = dist.all_to_all_single(received, send, from_holders, to_owners, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    full = [{item.index: received.new_empty(item.shape) for item in own} for _ in fields]
    _unpack(
        received,
        [
            item.layout.view_of(field[item.index], holder)
            for holder in range(len(bucket.owned))
            if from_holders[holder]
            for field in full
            for item in own
        ],
    )
    return full


def spread(
    bucket: Bucket, full: Mapping[int, Tensor], local: Mapping[int, Tensor], process_group: dist.ProcessGroup | None
) -> Task[None]:
    """As ``scatter_from_owner``, of replicated tensors: an all-gather, or a broadcast where one rank owns them all."""
    if sum(map(bool, bucket.owned)) == 1:
        yield from _broadcast(bucket, full, local, process_group)
    else:
        yield from _all_gather(bucket, full, local, process_group)


def scatter(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
) -> Task[None]:
    """As ``scatter_from_owner``, of sharded tensors: one all-to-all."""
    own = bucket.owned[own_rank(process_group)]
    whole = {item.index: full[item.index].contiguous() for item in own}
    pieces = [
        item.layout.view_of(whole[item.index], holder)
        for holder in range(len(bucket.owned))
        if route.from_holders[holder]
        for item in own
    ]
    send = _pack(pieces, bucket)
    received = torch.empty(sum(route.to_owners), dtype=bucket.dtype, device=bucket.device)
    sizes = list(route.to_owners), list(route.from_holders)
    work = dist.all_to_all_single(received, send, *sizes, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    _unpack(received, [local[item.index] for item in bucket.items])


def _all_gather(
    bucket: Bucket, full: Mapping[int, Tensor], local: Mapping[int, Tensor], process_group: dist.ProcessGroup | None
) -> Task[None]:
    rank = own_rank(process_group)
    # Rounds are balanced, so padding every owner's share to the largest costs little and needs one even collective.
    share = max(sum(item.shape.numel() for item in items) for items in bucket.owned)
    send = torch.empty(share, dtype=bucket.dtype, device=bucket.device)
    own_parts = [full[item.index].reshape(-1) for item in bucket.owned[rank]]
    copy(cut(send, own_parts), own_parts)
    received = torch.empty(share * len(bucket.owned), dtype=bucket.dtype, device=bucket.device)
    work = gather_single(received, send, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    for owner, items in enumerate(bucket.owned):
        if owner == rank:
            write_back({item.index: full[item.index] for item in items}, local)
        else:
            _unpack(received[owner * share :], [local[item.index] for item in items])


def _broadcast(
    bucket: Bucket, full: Mapping[int, Tensor], local: Mapping[int, Tensor], process_group: dist.ProcessGroup | None
) -> Task[None]:
    """From the one rank that owns all of the bucket."""
    (owner,) = [rank for rank, items in enumerate(bucket.owned) if items]
    is_mine = owner == own_rank(process_group)
    if is_mine:
        buffer = _pack([full[item.index] for item in bucket.items], bucket)
    else:
        numel = sum(item.shape.numel() for item in bucket.items)
        buffer = torch.empty(numel, dtype=bucket.dtype, device=bucket.device)
    work = dist.broadcast(buffer, group=process_group, group_src=owner, async_op=True)
    yield
    work.wait()
    if is_mine:
        write_back({item.index: full[item.index] for item in bucket.items}, local)
    else:
        _unpack(buffer, [local[item.index] for item in bucket.items])


def _pack(parts: list[Tensor], bucket: Bucket) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=bucket.dtype, device=bucket.device)
    return torch.cat([part.reshape(-1) for part in parts])


def _unpack(flat: Tensor, parts: list[Tensor]) -> None:
    copy(parts, cut(flat, parts))
