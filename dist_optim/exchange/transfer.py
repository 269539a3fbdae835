"""The only collectives of a step: whole tensors to their owners, and updated parameters back to their holders.

Both directions are generators that yield once, while their collective is in flight, so that a few buckets can overlap
(``run_tasks``). They yield equally often on every rank, whether the rank owns anything or not: that keeps the order of
collectives equal everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Bucket, split_sizes
from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["Task", "gather_to_owner", "run_tasks", "scatter_from_owner"]

# torch 2.13 renamed the collective.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Result = TypeVar("Result")
Task = Generator[None, None, Result]


def gather_to_owner(
    bucket: Bucket, fields: Sequence[Mapping[int, Tensor]], process_group: dist.ProcessGroup | None
) -> Task[list[dict[int, Tensor]]]:
    """Give each owner the full tensors that it owns: its gradients, or gradients and parameters in one go.

    Collective: the same buckets in the same order on every rank. Yields once, while the all-to-all is in flight.
    A replicated bucket sends nothing: its owner holds the full tensors already.

    Args:
        bucket: The tensors that travel together.
        fields: One mapping a field (gradient, parameter) from item index to this rank's part: plain tensors of the
            bucket's dtype, any may have ``numel() == 0``.
        process_group: The ranks of the bucket's plan.

    Returns:
        For each field: item index to full tensor, for the items that this rank owns.
    """
    rank = own_rank(process_group)
    own = bucket.owned[rank]
    if bucket.is_replicated or num_ranks(process_group) == 1:
        yield
        return [{item.index: field[item.index] for item in own} for field in fields]
    to_owners, from_holders = ([len(fields) * size for size in sizes] for sizes in split_sizes(bucket, rank))
    send = _pack([field[item.index] for items in bucket.owned for field in fields for item in items], bucket)
    received = torch.empty(sum(from_holders), dtype=bucket.dtype, device=bucket.device)
    work = dist.all_to_all_single(received, send, from_holders, to_owners, group=process_group, async_op=True)
    yield
    work.wait()
    del send  # it had to live until the collective was done
    full = [{item.index: received.new_empty(item.shape) for item in own} for _ in fields]
    _unpack(
        received,
        (
            item.layout.view_of(field[item.index], holder)
            for holder in range(len(bucket.owned))
            for field in full
            for item in own
        ),
    )
    return full


def scatter_from_owner(
    bucket: Bucket, full: Mapping[int, Tensor], local: Mapping[int, Tensor], process_group: dist.ProcessGroup | None
) -> Task[None]:
    """Write the owners' full tensors into every rank's parts.

    Collective, like ``gather_to_owner``. Yields once, while the collective is in flight: an all-to-all for sharded
    tensors, an all-gather for replicated ones.

    Args:
        bucket: The tensors that travel together.
        full: Item index to updated full tensor, for the items that this rank owns.
        local: Item index to this rank's part, which is written in place.
        process_group: The ranks of the bucket's plan.
    """
    if num_ranks(process_group) == 1:
        yield
        _write_back({item.index: full[item.index] for item in bucket.items}, local)
    elif bucket.is_replicated:
        yield from _all_gather(bucket, full, local, process_group)
    else:
        yield from _all_to_all(bucket, full, local, process_group)


def run_tasks(tasks: Iterable[Task[None]], num_in_flight: int = 2) -> None:
    """Advance generators round-robin, at most ``num_in_flight`` at a time: the same order on every rank."""
    waiting, running = deque(tasks), deque[Task[None]]()
    while waiting or running:
        while waiting and len(running) < num_in_flight:
            running.append(waiting.popleft())
            next(running[-1], None)
        task = running.popleft()
        try:
            next(task)
        except StopIteration:
            continue
        running.append(task)


def _all_to_all(
    bucket: Bucket, full: Mapping[int, Tensor], local: Mapping[int, Tensor], process_group: dist.ProcessGroup | None
) -> Task[None]:
    rank = own_rank(process_group)
    from_owners, to_holders = split_sizes(bucket, rank)
    own = bucket.owned[rank]
    pieces = [item.layout.view_of(full[item.index].contiguous(), r) for r in range(len(bucket.owned)) for item in own]
    send = _pack(pieces, bucket)
    received = torch.empty(sum(from_owners), dtype=bucket.dtype, device=bucket.device)
    work = dist.all_to_all_single(received, send, from_owners, to_holders, group=process_group, async_op=True)
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
    send = torch.zeros(share, dtype=bucket.dtype, device=bucket.device)
    own = bucket.owned[rank]
    own_flat = _pack([full[item.index] for item in own], bucket)
    send[: own_flat.numel()].copy_(own_flat)
    received = torch.empty(share * len(bucket.owned), dtype=bucket.dtype, device=bucket.device)
    work = _all_gather_single(received, send, group=process_group, async_op=True)
    yield
    work.wait()
    del send
    for owner, items in enumerate(bucket.owned):
        if owner == rank:
            _write_back({item.index: full[item.index] for item in items}, local)
        else:
            _unpack(received[owner * share :], [local[item.index] for item in items])


def _pack(parts: list[Tensor], bucket: Bucket) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=bucket.dtype, device=bucket.device)
    return torch.cat([part.reshape(-1) for part in parts])


def _unpack(flat: Tensor, parts: Iterable[Tensor]) -> None:
    at = 0
    for part in parts:
        part.copy_(flat[at : at + part.numel()].view(part.shape))
        at += part.numel()


def _write_back(full: Mapping[int, Tensor], local: Mapping[int, Tensor]) -> None:
    """Copy where upstream put the new values into other storage (some optimizers rebind ``.data``)."""
    for index, tensor in full.items():
        if tensor.data_ptr() != local[index].data_ptr():
            local[index].copy_(tensor)
