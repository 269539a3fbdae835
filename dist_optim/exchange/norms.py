"""The norm of all gradients together, exact under every layout: norms of whole tensors, combined in parameter order.

Summing squares over slices rounds differently from a norm over the whole tensor, so clipped runs drift from the
one-process run. Here each tensor's norm is computed by torch's own kernel on the whole gradient, at its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Bucket, Route
from dist_optim.exchange.rooms import Room, as_if_alone
from dist_optim.exchange.tasks import Task
from dist_optim.exchange.transfer import gather_to_owner
from dist_optim.ranks.agreement import num_ranks

__all__ = ["NormOf", "combine_norms", "norm_as_clipping", "norm_in_fp32", "norm_task"]

NormOf = Callable[[Tensor], Tensor]


def norm_task(
    bucket: Bucket,
    gradients: Mapping[int, Tensor],
    norms: dict[int, Tensor],
    norm_of: NormOf,
    route: Route,
    process_group: dist.ProcessGroup | None,
    room: Room,
) -> Task[None]:
    """Write the norms of the whole gradients that this rank owns into ``norms``. Collective, as ``gather_to_owner``."""
    (full,) = yield from gather_to_owner(bucket, [gradients], route, process_group, room)
    norms.update({index: norm_of(gradient) for index, gradient in full.items()})
    room.close()


def combine_norms(
    norms: Mapping[int, Tensor],
    order: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    process_group: dist.ProcessGroup | None,
    norm_type: float = 2.0,
) -> Tensor:
    """The norm of all gradients together: 0-D, equal on all ranks. Collective: one small all-reduce.

    Args:
        norms: 0-D norms of whole tensors, by index; one rank has each.
        order: The tensors that have a gradient, in the order in which norms are combined, the same on every rank.
        dtypes: For each of them, the dtype of its norm.
        device: Where the process group communicates.
        process_group: The ranks that step together.
        norm_type: As of the norms themselves.
    """
    if not order:
        return torch.zeros((), device=device)
    zeros = {dtype: torch.zeros((), dtype=dtype, device=device) for dtype in set(dtypes)}
    found = zip(order, dtypes, strict=True)
    stacked = torch.stack([norms[at].to(device) if at in norms else zeros[dtype] for at, dtype in found])
    if num_ranks(process_group) > 1:
        dist.all_reduce(stacked, group=process_group)  # one rank has each norm, the others zero: a sum is exact
    return torch.linalg.vector_norm(stacked, norm_type)


def norm_in_fp32(gradient: Tensor) -> Tensor:
    """The Euclidean norm of a gradient of any dtype, taken in fp32."""
    return torch.linalg.vector_norm(_read_alike(gradient).float(), 2.0)


def norm_as_clipping(norm_type: float) -> NormOf:
    """By the kernel that torch's ``clip_grad_norm_`` takes."""

    def norm_of(gradient: Tensor) -> Tensor:
        (norm,) = torch._foreach_norm([_read_alike(gradient)], norm_type)
        return norm

    return norm_of


def _read_alike(gradient: Tensor) -> Tensor:
    """A GPU adds in an order that depends on where the gradient begins; the CPU does not."""
    return gradient if gradient.is_cpu else as_if_alone(gradient)
