"""The only messages of a step: whole tensors to their owners, and updated parameters back to their holders.

Both directions are generators that yield once, while their messages are in flight (``tasks``). Between a few ranks
on the host they go in place (``in_place``), else packed (``packed``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange import in_place, packed
from dist_optim.exchange.clock import timed
from dist_optim.exchange.copies import shaped, write_back
from dist_optim.exchange.plan import Bucket, Route
from dist_optim.exchange.rooms import Room
from dist_optim.exchange.tasks import Task
from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["gather_to_owner", "scatter_from_owner"]

MAX_PEERS = 16
"""Ranks between which messages go in place: with more of them parts are small, and messages many."""


def gather_to_owner(
    bucket: Bucket,
    fields: Sequence[Mapping[int, Tensor]],
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room | None = None,
) -> Task[list[dict[int, Tensor]]]:
    """Give each owner the full tensors that it owns: its gradients, or gradients and parameters in one go.

    Collective: the same buckets in the same order on every rank. Yields once, while the parts are on their way.
    A replicated bucket sends nothing: its owner holds the full tensors already.

    Args:
        bucket: The tensors that travel together.
        fields: One mapping a field (gradient, parameter) from item index to this rank's part: plain tensors of the
            bucket's dtype, any may have ``numel() == 0``.
        route: This rank's, of this bucket.
        process_group: The ranks of the bucket's plan.
        room: Memory for the full tensors, closed when nobody reads them any more.

    Returns:
        For each field: item index to full tensor, for the items that this rank owns.
    """
    return timed("gather", _gather(bucket, fields, route, process_group, room))


def scatter_from_owner(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room | None = None,
) -> Task[None]:
    """Write the owners' full tensors into every rank's parts.

    Collective, like ``gather_to_owner``. Yields once, while the parts are on their way.

    Args:
        bucket: The tensors that travel together.
        full: Item index to updated full tensor, for the items that this rank owns.
        local: Item index to this rank's part, which is written in place.
        route: This rank's, of this bucket.
        process_group: The ranks of the bucket's plan.
        room: Memory for what is packed.
    """
    return timed("scatter", _scatter(bucket, full, local, route, process_group, room))


def _gather(
    bucket: Bucket,
    fields: Sequence[Mapping[int, Tensor]],
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room | None,
) -> Task[list[dict[int, Tensor]]]:
    if bucket.is_replicated or num_ranks(process_group) == 1:
        yield
        own = bucket.owned[own_rank(process_group)]
        return [{item.index: shaped(field[item.index], item.shape) for item in own} for field in fields]
    if _goes_in_place(bucket):
        return (yield from in_place.gather(bucket, fields, route, process_group, room or Room()))
    return (yield from packed.gather(bucket, fields, route, process_group))


def _scatter(
    bucket: Bucket,
    full: Mapping[int, Tensor],
    local: Mapping[int, Tensor],
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room | None,
) -> Task[None]:
    if num_ranks(process_group) == 1:
        yield
        write_back({item.index: full[item.index] for item in bucket.items}, local)
        return
    if bucket.is_replicated:
        write_back({item.index: full[item.index] for item in bucket.owned[own_rank(process_group)]}, local)
        full = local
    if _goes_in_place(bucket):
        yield from in_place.scatter(bucket, full, local, route, process_group, room or Room())
    elif bucket.is_replicated:
        yield from packed.spread(bucket, local, process_group)
    else:
        yield from packed.scatter(bucket, full, local, route, process_group)


def _goes_in_place(bucket: Bucket) -> bool:
    return bucket.device.type == "cpu" and len(bucket.owned) <= MAX_PEERS
