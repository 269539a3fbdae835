"""Global-norm clipping that is exact under every layout: the norms of whole tensors, combined in parameter order.

Summing squares over slices rounds differently from a norm over the whole tensor, so clipped runs drift from the
one-process run. Here each tensor's norm is computed by torch's own kernel on the whole gradient, at its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Bucket, Item, make_plan
from dist_optim.exchange.transfer import Task, gather_to_owner, run_tasks
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["clip_gradients", "combine_norms", "norm_in_fp32", "total_norm"]

BUCKET_NUMEL = 16 << 20


@torch.no_grad()
def clip_gradients(
    placed: Sequence[PlacedParameter],
    present: Sequence[bool],
    max_norm: float,
    norm_type: float,
    owners: Sequence[int | None],
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm``, as torch's ``clip_grad_norm_`` does.

    Collective. Moves each sharded gradient once more, a few buckets at a time.

    Args:
        placed: Parameters in the order in which their norms are combined.
        present: Which of them have a gradient, the same on every rank.
        max_norm: Upper bound of the global norm.
        norm_type: Order of the norm; ``inf`` for the largest element.
        owners: For each parameter the rank that alone holds its reduced gradient; None where all ranks do.
        process_group: The ranks that step together.

    Returns:
        The global norm before clipping, a 0-D tensor, equal on all ranks.
    """
    total = total_norm(placed, present, partial(_norm, norm_type=norm_type), norm_type, owners, process_group)
    coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for one, is_present in zip(placed, present, strict=True):
        gradient = one.local_gradient() if is_present else None
        if gradient is not None:
            gradient.mul_(coefficient.to(gradient.device))
    return total


@torch.no_grad()
def total_norm(
    placed: Sequence[PlacedParameter],
    present: Sequence[bool],
    norm_of: Callable[[Tensor], Tensor],
    norm_type: float,
    owners: Sequence[int | None],
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """The norm of all gradients together, from ``norm_of`` of each whole gradient. Collective; as ``clip_gradients``.

    Returns:
        A 0-D tensor, equal on all ranks.
    """
    items = [
        Item(index, one.shape, one.layout, one.dtype, one.device, float(one.shape.numel()))
        for index, one in enumerate(placed)
        if present[index]
    ]
    norms = [norm_of(torch.zeros(1, dtype=one.dtype, device=one.device)) for one in placed]
    for item in items:
        gradient = placed[item.index].local_gradient()
        if item.layout.is_replicated and gradient is not None and (owners[item.index] or 0) == own_rank(process_group):
            norms[item.index] = norm_of(gradient)
    sharded = [item for item in items if not item.layout.is_replicated]
    plan = make_plan(sharded, num_ranks(process_group), BUCKET_NUMEL)
    run_tasks(_norm_task(bucket, placed, norms, norm_of, process_group) for bucket in plan.buckets)
    is_everywhere = [num_ranks(process_group) == 1] * len(items)
    found = [norms[item.index] for item in items]
    return combine_norms(found, is_everywhere, placed[0].device, process_group, norm_type)


def _norm_task(
    bucket: Bucket,
    placed: Sequence[PlacedParameter],
    norms: list[Tensor],
    norm_of: Callable[[Tensor], Tensor],
    process_group: dist.ProcessGroup | None,
) -> Task[None]:
    local = {}
    for item in bucket.items:
        gradient = placed[item.index].local_gradient()
        local[item.index] = placed[item.index].local() if gradient is None else gradient  # None: nothing is stored here
    (full,) = yield from gather_to_owner(bucket, [local], process_group)
    for item in bucket.owned[own_rank(process_group)]:
        norms[item.index] = norm_of(full[item.index])


@torch.no_grad()
def combine_norms(
    norms: Sequence[Tensor],
    is_everywhere: Sequence[bool],
    device: torch.device,
    process_group: dist.ProcessGroup | None,
    norm_type: float = 2.0,
) -> Tensor:
    """The norm of all gradients together, from those of whole tensors, in their order. Collective.

    Args:
        norms: One 0-D tensor each; zero at all ranks but one, unless ``is_everywhere``: then equal on all ranks.
        is_everywhere: Whether every rank has the norm.
        device: Where the process group communicates.
        process_group: The ranks that step together.
        norm_type: As of the norms themselves.
    """
    if not norms:
        return torch.zeros((), device=device)
    stacked = torch.stack([norm.to(device) for norm in norms])
    if not all(is_everywhere):
        if own_rank(process_group) > 0:
            stacked[torch.tensor(is_everywhere, device=device)] = 0.0
        dist.all_reduce(stacked, group=process_group)  # one rank has each norm, the others zero: a sum is exact
    return torch.linalg.vector_norm(stacked, norm_type)


def norm_in_fp32(gradient: Tensor) -> Tensor:
    """The Euclidean norm of a gradient of any dtype, taken in fp32."""
    return torch.linalg.vector_norm(gradient.float(), 2.0)


def _norm(gradient: Tensor, norm_type: float) -> Tensor:
    """By the kernel that torch's ``clip_grad_norm_`` takes."""
    (norm,) = torch._foreach_norm([gradient], norm_type)
    return norm
