"""What one ``step()`` call of DeepSpeed steps, in the terms of ``DistributedOptimizer``: parameters, layouts, ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.detect_zero import Call
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import num_ranks

__all__ = ["group_of", "place", "where_it_is"]


def place(placed: PlacedParameter, call: Call) -> PlacedParameter:
    """The parameter as one call sees it: its slice, or an empty tensor where another call steps it."""
    part = call.slices.get(placed.fqn)
    first = next(iter(call.slices.values()))
    if part is not None:
        view = nn.Parameter(part.weight())
        return PlacedParameter(placed.fqn, view, part.shape, part.layout, part.process_group, placed.position, True)
    empty = torch.empty(0, dtype=first.live.dtype, device=first.live.device)
    parameter = nn.Parameter(empty, requires_grad=placed.is_trained)
    where = (Elsewhere(), first.process_group, placed.position, placed.is_trained)
    return PlacedParameter(placed.fqn, parameter, placed.shape, *where)


def where_it_is(places: Sequence[PlacedParameter]) -> PlacedParameter:
    return next((placed for placed in places if not isinstance(placed.layout, Elsewhere)), places[0])


def group_of(call: Call) -> dist.ProcessGroup | None:
    """The ranks that hold the call's slices; this rank alone where every rank holds everything (stage 0).

    At stage 0 DeepSpeed saves the state of one rank for all, so each rank keeps all of it, as DeepSpeed's own do.
    """
    first = next(iter(call.slices.values()))
    if not first.layout.is_replicated:
        return first.process_group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True) if num_ranks() > 1 else None
