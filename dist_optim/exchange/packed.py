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

from dist_optim.exchange.copies import copy, cut
from dist_optim.exchange.plan import Bucket, Route
from dist_optim.exchange.route import is_large
from dist_optim.exchange.tasks import Task
from dist_optim.ranks.agreement import own_rank

__all__ = ["gather", "gather_single", "pack", "scatter", "spread", "unpack"]


# torch 2.13 renamed the collective.
gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather tensors of equal size into one."""


def gather(
    bucket: Bucket, fields: Sequence[Mapping[int, Tensor]], route: Route, process_group: dist.ProcessGroup | None
) -> Task[list[dict[int, Tensor]]]:
    """As ``gather_to_owner``, of sharded tensors: one all-to-all for all fields."""
    rank = own_rank(process_group)
    own, num_fields = bucket.owned[rank], len(fields)
    to_owners, from_holders = ([num_fields * n for n in sizes] for sizes in (route.to_owners, route.from_holders))
    has_copies = route.back is not route
    parts = [
        field[item.index]
        for owner, items in enumerate(bucket.owned)
        for field in fields
        for item in items
        if not has_copies or item.layout.is_read(rank, owner)
    ]
    send = pack(parts, bucket.dtype, bucket.device)
    received = torch.empty(sum(from_holders), dtype=bucket.dtype, device=bucket.device)
    work = dist.all_to_all_single(received, send, from_holders, to_owners, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    full = [{item.index: received.new_empty(item.shape) for item in own} for _ in fields]
    unpack(
        received,
        [
            item.layout.view_of(field[item.index], holder)
            for holder, numel in enumerate(from_holders)
            if numel
            for field in full
            for item in own
            if not has_copies or item.layout.is_read(holder, rank)
        ],
    )
    return full


def spread(bucket: Bucket, local: Mapping[int, Tensor], process_group: dist.ProcessGroup | None) -> Task[None]:
    """As ``scatter_from_owner``, of replicated tensors that are updated in place: large ones each by a broadcast.

    They go from where they lie to where they lie, so that no buffer keeps rounds from being on their way together. Of
    the small ones each owner's are padded to the largest share, for one all-gather.
    """
    rank, itemsize = own_rank(process_group), bucket.dtype.itemsize
    works: list[Any] = []
    landing: list[tuple[Tensor, list[Tensor]]] = []
    for owner, items in enumerate(bucket.owned):
        for tensor in (local[item.index] for item in items if is_large(item.shape.numel(), itemsize)):
            sent = tensor.contiguous()
            if sent is not tensor and owner != rank:
                landing.append((sent.view(-1), [tensor]))
            works.append(dist.broadcast(sent, group=process_group, group_src=owner, async_op=True))
    small = [
        [local[item.index] for item in items if not is_large(item.shape.numel(), itemsize)] for items in bucket.owned
    ]
    if share := max(sum(map(Tensor.numel, parts)) for parts in small):
        mine = torch.empty(share, dtype=bucket.dtype, device=bucket.device)
        copy(cut(mine, small[rank]), small[rank])
        received = torch.empty(share * len(small), dtype=bucket.dtype, device=bucket.device)
        works.append(gather_single(received, mine, group=process_group, async_op=True))
        landing += [(received[at * share :], parts) for at, parts in enumerate(small) if parts and at != rank]
    yield
    for work in works:
        work.wait()
    for buffer, parts in landing:
        unpack(buffer, parts)


def scatter(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
) -> Task[None]:
    """As ``scatter_from_owner``, of sharded tensors: one all-to-all."""
    own, back = bucket.owned[own_rank(process_group)], route.back
    whole = {item.index: full[item.index].contiguous() for item in own}
    pieces = [
        item.layout.view_of(whole[item.index], holder)
        for holder, numel in enumerate(back.from_holders)
        if numel
        for item in own
    ]
    send = pack(pieces, bucket.dtype, bucket.device)
    received = torch.empty(sum(back.to_owners), dtype=bucket.dtype, device=bucket.device)
    sizes = list(back.to_owners), list(back.from_holders)
    work = dist.all_to_all_single(received, send, *sizes, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    unpack(received, [local[item.index] for item in bucket.items])


def pack(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One buffer with all parts, one after the other."""
    if not parts:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.cat([part.reshape(-1) for part in parts])


def unpack(flat: Tensor, parts: list[Tensor]) -> None:
    """Copy them out of it again."""
    copy(parts, cut(flat, parts))
