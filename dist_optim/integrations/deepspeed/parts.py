"""What one ``step()`` call of DeepSpeed steps, in the terms of ``DistributedOptimizer``: parameters, layouts, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.detect_zero import Call
from dist_optim.layouts.layout import Elsewhere
from dist_optim.layouts.stack import Filters, Member, layer_of
from dist_optim.ranks.agreement import num_ranks

__all__ = ["group_of", "places_in", "where_it_is"]


def _place(placed: PlacedParameter, call: Call) -> PlacedParameter:
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


def places_in(group: Sequence[PlacedParameter], call: Call) -> list[PlacedParameter]:
    """A param group as one call sees it. The matrices of a stack share a parameter, of which each is a part."""
    held: dict[str, PlacedParameter] = {}
    for whole in map(PlacedParameter.whole, group):
        if whole.fqn not in held:
            held[whole.fqn] = _place(whole, call)
    return [_as_matrix(held[one.whole().fqn], one) for one in group]


def _as_matrix(held: PlacedParameter, one: PlacedParameter) -> PlacedParameter:
    """Of a parameter as a call sees it the matrix that ``one`` is of the model's own."""
    if isinstance(one.member, Member):
        layout, member = layer_of(held.layout, held.shape, one.member.at), replace(one.member, stack=held.layout)
        return replace(held, fqn=one.fqn, shape=one.shape, layout=layout, member=member)
    return held if one.member is None else replace(held, shape=one.shape, member=Filters(held.layout, held.shape))


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
