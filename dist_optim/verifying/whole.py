"""Whole tensors on one rank, put together from slices over the host: nothing of the exchange has a part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import host_group, num_ranks, own_rank
from dist_optim.stepping.at_owner import AtOwner

__all__ = ["whole_tensors"]


def whole_tensors(
    placed: Sequence[PlacedParameter], parts: Mapping[int, Tensor], process_group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Copies of whole tensors, by name, on the first rank of the group; nothing on the others. Collective.

    Args:
        placed: All parameters.
        parts: This rank's part of some tensors, by index: the same indices on every rank. Of a gradient that lies whole
            at its owner, what stands for it.
        process_group: The ranks that share the tensors.
    """
    is_first = own_rank(process_group) == 0
    found: dict[str, Tensor] = {}
    for index in sorted(parts):
        one, part = placed[index], parts[index].detach()
        if isinstance(part, AtOwner):
            pieces = _pieces(part.whole.gradient if part.whole.is_mine else None, process_group)
            if is_first:
                found[one.fqn] = next(piece for piece in pieces if piece is not None).to(one.device)
            continue
        if one.layout.is_replicated or num_ranks(process_group) == 1:
            if is_first:
                found[one.fqn] = part.clone().view(one.shape)
            continue
        pieces = _pieces(part, process_group)
        if is_first:
            found[one.fqn] = _joined(one, part, pieces)
    return found


def _pieces(part: Tensor | None, process_group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's part, on the first; one tensor at a time, so that no rank holds more than one."""
    part = None if part is None else part.detach().cpu()
    group = host_group(process_group) or dist.group.WORLD
    assert group is not None
    pieces: list[Any] | None = [None] * num_ranks(process_group) if own_rank(process_group) == 0 else None
    dist.gather_object(part, pieces, dst=dist.get_global_rank(group, 0), group=group)
    return pieces or []


def _joined(one: PlacedParameter, like: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    full = torch.empty(one.shape, dtype=like.dtype, device=like.device)
    for rank, piece in enumerate(pieces):
        view = one.layout.view_of(full, rank)
        view.copy_(piece.view(view.shape))
    return full
