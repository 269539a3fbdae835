"""All state of an optimizer by parameter name, every tensor whole, as one process holds it; and back into parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.packed import gather_single
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import gather_objects, host_group, num_ranks
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = [
    "StateByName",
    "gathered",
    "is_cut",
    "is_slice",
    "memory_order",
    "own_state",
    "parts_of",
    "shape_of_part",
    "shape_of_whole",
]

StateByName = dict[str, dict[str, Any]]
"""``{parameter: {key: tensor, number, string or None}}``"""


@dataclass(frozen=True, slots=True)
class _Held:
    """What the others need to know of one tensor that a rank holds all or a slice of."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]
    """Its dims from the outermost in memory to the innermost: products of matrices round by it."""
    whole: torch.Size
    """Of a slice, the shape of the whole tensor; else its own."""
    is_slice: bool


def own_state(held: Holdings) -> StateByName:
    """What this rank steps by; tensors are the live ones."""
    return {held.placed[index].fqn: own for one, index in held.stepped_here() if (own := one.encoded_state(index))}


def is_slice(held: Holdings, instance: UpstreamInstance, index: int, value: Any) -> bool:
    """Whether a value of the state is one of those that are cut like their parameter, or like its rows."""
    placed = held.placed[index]
    is_local = instance is held.local_instance and not placed.layout.is_replicated
    return is_local and isinstance(value, Tensor) and _is_like(value.shape, placed.local().shape, placed)


def is_cut(shape: torch.Size, placed: PlacedParameter) -> bool:
    """The same of a whole tensor of this shape, where the parameter is stepped in slices."""
    return _is_like(shape, placed.shape, placed)


def shape_of_part(shape: torch.Size, placed: PlacedParameter) -> torch.Size:
    """Of a whole tensor that ``is_cut``, the shape of this rank's part."""
    own = placed.local().shape
    return own if shape == placed.shape else torch.Size([own[0], *shape[1:]])


def shape_of_whole(part: torch.Size, placed: PlacedParameter) -> torch.Size:
    """Of a part that ``is_slice``, the shape of the whole tensor."""
    return placed.shape if part == placed.local().shape else torch.Size([placed.shape[0], *part[1:]])


def _is_like(shape: torch.Size, own: torch.Size, placed: PlacedParameter) -> bool:
    if not shape or shape == own:
        return bool(shape)
    is_of_rows = len(shape) == len(own) > 1 and shape[0] == own[0]
    return is_of_rows and placed.layout.fewest_rows(placed.shape[0]) is not None


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dims from the outermost in memory to the innermost."""
    return tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def gathered(held: Holdings, state: Mapping[str, Mapping[str, Any]] | None = None) -> StateByName:
    """All state, on every rank, in the order of the parameters. Collective on the ranks that share the work.

    It takes as much memory on each rank as the state of one process. Tensors travel over the host.

    Args:
        held: Who steps what.
        state: To be gathered in place of the live state: of the same parameters, in the same parts.
    """
    mine = own_state(held) if state is None else state
    if num_ranks(held.process_group) == 1:
        return {fqn: dict(own) for fqn, own in mine.items()}
    steppers = {held.placed[index].fqn: (instance, index) for instance, index in held.stepped_here()}
    listing = {
        fqn: {
            key: _described(value, held, *steppers[fqn]) if isinstance(value, Tensor) else value
            for key, value in own.items()
        }
        for fqn, own in mine.items()
    }
    by_rank = gather_objects(listing, held.process_group)
    whole: StateByName = {}
    for placed in held.placed:
        source = next((rank for rank, found in enumerate(by_rank) if placed.fqn in found), None)
        if source is None:
            continue
        own = mine.get(placed.fqn, {})
        whole[placed.fqn] = {
            key: _whole(own.get(key), what, placed, source, held) if isinstance(what, _Held) else what
            for key, what in by_rank[source][placed.fqn].items()
        }
    return whole


def parts_of(state: Mapping[str, Mapping[str, Any]], held: Holdings) -> StateByName:
    """Of whole state, what this rank steps by. Local."""
    found: StateByName = {}
    for instance, index in held.stepped_here():
        placed = held.placed[index]
        cuts = instance is held.local_instance and not placed.layout.is_replicated
        if own := state.get(placed.fqn):
            found[placed.fqn] = {key: _part(value, placed, held.rank) if cuts else value for key, value in own.items()}
    return found


def _part(value: Any, placed: PlacedParameter, rank: int) -> Any:
    if not isinstance(value, Tensor) or not is_cut(value.shape, placed):
        return value
    return placed.layout.view_of(value.contiguous(), rank)


def _described(tensor: Tensor, held: Holdings, instance: UpstreamInstance, index: int) -> _Held:
    is_part = is_slice(held, instance, index, tensor)
    whole = shape_of_whole(tensor.shape, held.placed[index]) if is_part else tensor.shape
    return _Held(tensor.shape, tensor.dtype, torch.device(tensor.device.type), memory_order(tensor), whole, is_part)


def _whole(value: Any, what: _Held, placed: PlacedParameter, source: int, held: Holdings) -> Tensor:
    """One tensor from the rank that holds it, or from the slices of all. Collective."""
    group = host_group(held.process_group)
    device = placed.device if what.device.type == placed.device.type else what.device
    if what.is_slice:
        return _joined(value, what, placed, held).to(device)
    if source == held.rank:
        in_order = value.detach().permute(what.order)
        data = in_order.cpu().contiguous()
    else:
        data = torch.empty([what.shape[dim] for dim in what.order], dtype=what.dtype, device="cpu")
    if data.numel():
        dist.broadcast(_as_bytes(data), group=group, group_src=source)
    back = sorted(range(len(what.order)), key=what.order.__getitem__)
    return data.permute(back).to(device)


def _joined(value: Any, what: _Held, placed: PlacedParameter, held: Holdings) -> Tensor:
    """A tensor that is cut like its parameter, or like its rows."""
    count, dtype = num_ranks(held.process_group), what.dtype
    shape = what.whole
    sizes = [placed.layout.numel_on(shape, rank) for rank in range(count)]
    mine = torch.zeros(max(sizes), dtype=dtype, device="cpu")
    if isinstance(value, Tensor):
        mine[: value.numel()] = value.detach().reshape(-1).cpu()
    everyones = torch.empty(count * max(sizes), dtype=dtype, device="cpu")
    gather_single(_as_bytes(everyones), _as_bytes(mine), group=host_group(held.process_group))
    whole = torch.empty(shape, dtype=dtype, device="cpu")
    for rank, (part, size) in enumerate(zip(everyones.split(max(sizes)), sizes, strict=True)):
        view = placed.layout.view_of(whole, rank)
        view.copy_(part[:size].view(view.shape))
    return whole


def _as_bytes(tensor: Tensor) -> Tensor:
    """The storage of a contiguous tensor: every dtype travels alike."""
    flat = tensor.reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element may have any stride, and be contiguous
