"""The only collectives of a step: whole tensors to their owners, and updated parameters back to their holders.

Both directions are generators that yield once, while their collective is in flight, so that a few buckets can overlap
(``run_tasks``). They yield equally often on every rank, whether the rank owns anything or not: that keeps the order of
collectives equal everywhere.

A buffer that a collective reads or writes is a local of its generator until ``work.wait()`` has returned, and the work
itself holds it too: a generator that is dropped half way, because another one failed, frees nothing that is in use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Bucket, Route
from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["Task", "gather_single", "gather_to_owner", "run_tasks", "scatter_from_owner"]

# torch 2.13 renamed the collective.
gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather tensors of equal size into one."""

Result = TypeVar("Result")
Task = Generator[None, None, Result]


def gather_to_owner(
    bucket: Bucket, fields: Sequence[Mapping[int, Tensor]], route: Route, process_group: dist.ProcessGroup | None
) -> Task[list[dict[int, Tensor]]]:
    """Give each owner the full tensors that it owns: its gradients, or gradients and parameters in one go.

    Collective: the same buckets in the same order on every rank. Yields once, while the all-to-all is in flight.
    A replicated bucket sends nothing: its owner holds the full tensors already.

    Args:
        bucket: The tensors that travel together.
        fields: One mapping a field (gradient, parameter) from item index to this rank's part: plain tensors of the
            bucket's dtype, any may have ``numel() == 0``.
        route: This rank's, of this bucket.
        process_group: The ranks of the bucket's plan.

    Returns:
        For each field: item index to full tensor, for the items that this rank owns.
    """
    own = bucket.owned[own_rank(process_group)]
    if bucket.is_replicated or num_ranks(process_group) == 1:
        yield
        # An engine that flattens parameters does so for one rank too.
        return [{item.index: _shaped(field[item.index], item.shape) for item in own} for field in fields]
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


def _shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def scatter_from_owner(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
) -> Task[None]:
    """Write the owners' full tensors into every rank's parts.

    Collective, like ``gather_to_owner``. Yields once, while the collective is in flight: an all-to-all for sharded
    tensors, an all-gather for replicated ones, a broadcast where one rank owns them all.

    Args:
        bucket: The tensors that travel together.
        full: Item index to updated full tensor, for the items that this rank owns.
        local: Item index to this rank's part, which is written in place.
        route: This rank's, of this bucket.
        process_group: The ranks of the bucket's plan.
    """
    if num_ranks(process_group) == 1:
        yield
        _write_back({item.index: full[item.index] for item in bucket.items}, local)
    elif bucket.is_replicated and sum(map(bool, bucket.owned)) == 1:
        yield from _broadcast(bucket, full, local, process_group)
    elif bucket.is_replicated:
        yield from _all_gather(bucket, full, local, process_group)
    else:
        yield from _all_to_all(bucket, full, local, route, process_group)


def run_tasks(tasks: Iterable[Task[None]]) -> None:
    """Advance generators in one order on every rank, so that collectives are in flight while tensors are stepped.

    The next bucket's gather is started before a bucket is stepped, and its scatter has the time of the next step to
    arrive. So three buckets are in flight at the most.
    """
    waiting, gathering, returning = iter(tasks), deque[Task[None]](), deque[Task[None]]()
    _start(waiting, gathering)
    while gathering:
        _start(waiting, gathering)
        task = gathering.popleft()
        if _goes_on(task):
            returning.append(task)
        if len(returning) > 1:
            _finish(returning.popleft())
    for task in returning:
        _finish(task)


def _start(waiting: Iterator[Task[None]], gathering: deque[Task[None]]) -> None:
    task = next(waiting, None)
    if task is not None and _goes_on(task):
        gathering.append(task)


def _goes_on(task: Task[None]) -> bool:
    """Advance it to where it waits for its next collective; False at its end."""
    try:
        next(task)
    except StopIteration:
        return False
    return True


def _finish(task: Task[None]) -> None:
    while _goes_on(task):
        pass


def _all_to_all(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
) -> Task[None]:
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
    _copy(_cut(send, own_parts), own_parts)
    received = torch.empty(share * len(bucket.owned), dtype=bucket.dtype, device=bucket.device)
    work = gather_single(received, send, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    for owner, items in enumerate(bucket.owned):
        if owner == rank:
            _write_back({item.index: full[item.index] for item in items}, local)
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
        _write_back({item.index: full[item.index] for item in bucket.items}, local)
    else:
        _unpack(buffer, [local[item.index] for item in bucket.items])


def _pack(parts: list[Tensor], bucket: Bucket) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=bucket.dtype, device=bucket.device)
    return torch.cat([part.reshape(-1) for part in parts])


def _unpack(flat: Tensor, parts: list[Tensor]) -> None:
    _copy(parts, _cut(flat, parts))


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the buffer, one after the other, in these shapes."""
    if not like:
        return []
    sizes = [part.numel() for part in like]
    return [piece.view(part.shape) for piece, part in zip(flat[: sum(sizes)].split(sizes), like, strict=True)]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _write_back(full: Mapping[int, Tensor], local: Mapping[int, Tensor]) -> None:
    """Copy where upstream put the new values into other storage (some optimizers rebind ``.data``)."""
    moved = [index for index, tensor in full.items() if tensor.data_ptr() != local[index].data_ptr()]
    _copy([local[index] for index in moved], [_shaped(full[index], local[index].shape) for index in moved])
