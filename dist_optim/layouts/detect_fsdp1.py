"""FSDP1's flat parameters: which range of each original parameter every rank of the shard group stores.

FSDP1 concatenates the parameters of a unit, with alignment padding between them, and cuts the result into equal chunks,
one a rank. With ``use_orig_params=True`` an original parameter is then a 1-D view of the rank's chunk, or has no
elements; its shape, its place, and the other ranks' ranges are only in the unit's private handle, which is read here.
Its hybrid strategies cut among the ranks of a shard group, and each group of several has a replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_optim.errors import UnsupportedLayoutError
from dist_optim.layouts.holders import Holders
from dist_optim.layouts.layout import FlatRange, Layout, Replicated
from dist_optim.overrides import check
from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["FlatPlace", "is_marked", "places_by_parameter", "reshard"]


@dataclass(frozen=True, slots=True)
class FlatPlace:
    """Shape and layout of one original parameter, and the ranks that it is over."""

    shape: torch.Size
    layout: Layout
    process_group: dist.ProcessGroup | None


def is_marked(parameter: nn.Parameter) -> bool:
    """Whether FSDP1 has marked it as a part of its flat parameter: some optimizers then sum over ranks themselves."""
    return hasattr(parameter, "_fsdp_flattened")


def places_by_parameter(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, shares_replicas: bool = True
) -> dict[int, FlatPlace]:
    """``id(parameter)`` to its place, for every parameter that FSDP1 manages; empty for a model without FSDP1.

    Args:
        model: As it will be trained.
        process_group: The ranks that train the model; the default group when None.
        shares_replicas: Whether the replicas of shards share the work: where together they are these ranks.

    Raises:
        UnsupportedLayoutError: A unit was wrapped with ``use_orig_params=False``, in replicas of nothing sharded, or
            with a parameter that is not contiguous. Of the last, perhaps on this rank alone.
        RuntimeError: FSDP1's own record of this rank's ranges contradicts the arithmetic here.
    """
    places: dict[int, FlatPlace] = {}
    for unit in _units(model):
        check("FSDP1")
        if unit._handle is None:  # a unit without parameters of its own
            continue
        if not unit._use_orig_params:
            raise UnsupportedLayoutError(
                "The model is wrapped by FSDP1 with use_orig_params=False, which hides the original parameters. Pass "
                "use_orig_params=True (fsdp_use_orig_params: true in accelerate), or use FSDP2 (fsdp_version: 2)."
            )
        replicas = getattr(unit, "_inter_node_pg", None)
        if replicas is not None:
            _refuse_lone_shards(unit, replicas)
        _refuse_other_orders(unit._handle)
        held = _holders(unit, replicas, process_group) if shares_replicas and replicas is not None else None
        places.update(_places_of_unit(unit._handle, held, process_group))
    return places


def reshard(unit: Any) -> None:
    """Free full parameters that a forward pass without backward left gathered, so that the shards are in view."""
    handle = unit._handle
    if handle is None or not handle.uses_sharded_strategy or not hasattr(handle.flat_param, "_full_param_padded"):
        return  # nothing is gathered before the first forward pass, which creates the storage for it
    # After a forward pass the root shows its shards again, but keeps the gathered storage, and reuses it: what counts
    # is the storage.
    if not handle.needs_unshard():
        handle.reshard(True)
        handle.post_reshard()
        handle._prefetched = False


def _units(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))


def _refuse_lone_shards(unit: Any, replicas: dist.ProcessGroup) -> None:
    """Replicas of shard groups of one rank each: FSDP1 then shards nothing, and forgets to reduce between them."""
    if num_ranks(unit.process_group) == 1 and num_ranks(replicas) > 1:
        raise UnsupportedLayoutError(
            "FSDP1's hybrid sharding has one rank in each shard group here (one device a node, or CPU ranks): torch "
            f"{torch.__version__} then shards nothing and reduces no gradient between the replicas, which train apart. "
            "Use FULL_SHARD or DistributedDataParallel, or give FSDP1 a device_mesh of two dims."
        )


def _refuse_other_orders(handle: Any) -> None:
    """FSDP1 flattens a parameter in the order of its memory: ranges of one that is permuted there hold other elements
    than ranges of its rows. Each rank knows of those that it has a part of.
    """
    if not handle.uses_sharded_strategy:
        return
    parts = handle.shard_metadata()
    for name, shape, stride in zip(parts.param_names, parts.param_shapes, parts.param_strides, strict=True):
        if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
            raise UnsupportedLayoutError(
                f"{name!r} was not contiguous when FSDP1 wrapped it (strides {tuple(stride)}: channels_last, or a "
                "transposed view), and is sharded in the order of its memory. Before wrapping, on all ranks: "
                "model.to(memory_format=torch.contiguous_format), or parameter.data = parameter.data.contiguous()."
            )


def _holders(unit: Any, replicas: dist.ProcessGroup, process_group: dist.ProcessGroup | None) -> Holders | None:
    """Which rank holds which chunk, where shard groups and their replicas are all these ranks, in rising order.

    Ranks that FSDP1 was given as a pair of groups say nothing of the others': what is not in this order is not shared,
    and a rank that sees its own groups in it can conclude that all do, since each replica has one rank of each group.
    """
    if not unit._handle.uses_sharded_strategy:
        return None
    shards = unit.process_group
    everybody = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    num_shards, num_replicas = num_ranks(shards), num_ranks(replicas)
    if num_shards * num_replicas != len(everybody):
        return None
    at = everybody.index(dist.get_rank())
    chunk = at % num_shards
    of_copy, of_chunk = everybody[at - chunk : at - chunk + num_shards], everybody[chunk::num_shards]
    if (dist.get_process_group_ranks(shards), dist.get_process_group_ranks(replicas)) != (of_copy, of_chunk):
        return None
    return Holders(tuple(rank % num_shards for rank in range(len(everybody))))


def _places_of_unit(
    handle: Any, held: Holders | None, process_group: dist.ProcessGroup | None
) -> Iterator[tuple[int, FlatPlace]]:
    flat, shards = handle.flat_param, handle.process_group
    world_size = num_ranks(shards)
    group, rank = (shards, own_rank(shards)) if held is None else (process_group, own_rank(process_group))
    ends = list(accumulate(flat._numels_with_padding))
    starts = [end - numel for end, numel in zip(ends, flat._numels_with_padding, strict=True)]
    starts = [start for start, is_padding in zip(starts, flat._is_padding_mask, strict=True) if not is_padding]
    chunk = flat._sharded_size.numel() if handle.uses_sharded_strategy else 0
    for at, (parameter, shape, start) in enumerate(zip(flat._params, flat._shapes, starts, strict=True)):
        if not handle.uses_sharded_strategy:
            yield id(parameter), FlatPlace(shape, Replicated(), shards)
            continue
        layout = replace(FlatRange.cut(shape.numel(), chunk, world_size, start), held=held)
        _check_own_range(flat._shard_param_infos[at], *layout.range_on(rank), flat._fqns[at])
        yield id(parameter), FlatPlace(shape, layout, group)


def _check_own_range(info: Any, start: int, end: int, name: str) -> None:
    recorded = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else None
    if recorded != ((start, end) if start < end else None):
        raise RuntimeError(
            f"FSDP1 of torch {torch.__version__} records the range {recorded} of {name!r} for this rank, where "
            f"{(start, end)} was expected: its layout has changed. Use FSDP2, or a torch version between 2.9 and 2.13."
        )
