"""How each engine lays a model out, call by call and byte by byte: ``place``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dist_optim.errors import UnsupportedError, UsageError
from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.layout import DimShard, FlatRange, Layout, Replicated
from dist_optim.planning.placement import (
    STRATEGIES,
    Placement,
    Request,
    away,
    bytes_of,
    largest_of,
    names_in,
    on_all,
    touched,
)

__all__ = ["place", "replicas_of"]

FUSED_BUCKET = 64 << 20
"""Bytes of gradients that wait for each other under DDP, where they are applied inside backward."""
ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket, unless its configuration says otherwise."""
ZERO_SUB_GROUP = 1_000_000_000
ZERO_PERSISTENT = 100_000
"""Parameters of fewer elements are never divided at stage 3, but for their masters."""


def place(asked: Request) -> Placement:
    """Where everything lies.

    Raises:
        UsageError: There is no such strategy, or not on so many ranks.
    """
    if asked.strategy not in STRATEGIES:
        raise UsageError(f"strategy {asked.strategy!r} is unknown. Strategies: {', '.join(STRATEGIES)}.")
    if asked.num_ranks < 1 or (asked.strategy == "one" and asked.num_ranks > 1):
        raise UsageError(f"{asked.num_ranks} ranks under {asked.strategy!r}: give 1 or more, and 1 for 'one'.")
    return _PLACES[asked.strategy](asked)


def replicas_of(strategy: str, num_ranks: int, num_nodes: int) -> int:
    """How many groups of ranks hold the same shards: under HSDP one a node, or two in one node.

    Raises:
        UnsupportedError: They do not divide the ranks.
    """
    if strategy != "hsdp":
        return 1
    replicas = num_nodes if num_nodes > 1 else 2
    if num_ranks % replicas:
        raise UnsupportedError(
            f"hsdp: {num_ranks} ranks do not make {replicas} groups of equal size. Choose other --nodes, or fsdp2."
        )
    return replicas


def _replicated(asked: Request) -> Placement:
    """One process and DDP."""
    ranks, names = asked.num_ranks, names_in(asked)
    total, trained = bytes_of(asked, asked.model.shapes), bytes_of(asked, names)
    at_once = max(FUSED_BUCKET if ranks > 1 else 0, largest_of(asked, names))
    return Placement(
        num_sharing=ranks,
        calls=({name: Replicated() for name in names},),
        stepped_dtype=asked.dtype,
        weights=on_all(ranks, total),
        gradients=on_all(ranks, trained if asked.stores_gradients else 0),
        masters=on_all(ranks, 0),
        buffers=at_once if not asked.stores_gradients else trained if ranks > 1 else 0,  # DDP's reducer
        wire={"backward: all-reduce": 2 * away(trained, ranks)},
    )


def _fsdp2(asked: Request) -> Placement:
    """Rows; each rank's part is padded to the largest."""
    replicas = replicas_of(asked.strategy, asked.num_ranks, asked.num_nodes)
    ranks = asked.num_ranks // replicas
    shapes, names, itemsize = asked.model.shapes, names_in(asked), asked.dtype.itemsize

    def padded(name: str) -> int:
        shape = shapes[name]
        return itemsize * (-(-shape[0] // ranks) * (shape.numel() // shape[0]) if shape and shape[0] else shape.numel())

    rows: Layout = DimShard(0, ranks)
    sharing = ranks
    if replicas > 1 and asked.stores_gradients:  # replicas share what is stepped whole
        sharing = asked.num_ranks
        rows = BoxShard(((0, ranks),), tuple((rank % ranks,) for rank in range(sharing)))
    layouts: dict[str, Layout] = {name: rows if shapes[name] and ranks > 1 else Replicated() for name in names}
    return Placement(
        num_sharing=sharing,
        calls=(layouts,),
        stepped_dtype=asked.dtype,
        weights=on_all(sharing, sum(map(padded, shapes))),
        gradients=on_all(sharing, sum(map(padded, names)) if asked.stores_gradients else 0),
        masters=on_all(sharing, 0),
        **_gathering(asked, ranks),
    )


def _fsdp1(asked: Request) -> Placement:
    """Flat units, each parameter aligned to 16 bytes, in equal chunks."""
    ranks, shapes, itemsize = asked.num_ranks, asked.model.shapes, asked.dtype.itemsize
    aligned = 16 // asked.precision.compute.itemsize
    layouts: dict[str, Layout] = {}
    chunks = []
    for unit in asked.model.units:
        at, starts = 0, {}
        for name in unit:
            at = starts[name] = -(-at // aligned) * aligned
            at += shapes[name].numel()
        chunk = -(-at // ranks)
        chunks.append(chunk * itemsize)
        layouts |= {name: FlatRange.cut(shapes[name].numel(), chunk, ranks, start) for name, start in starts.items()}
    names = set(names_in(asked))
    return Placement(
        num_sharing=ranks,
        calls=({name: Replicated() if ranks == 1 else one for name, one in layouts.items() if name in names},),
        stepped_dtype=asked.dtype,
        weights=on_all(ranks, sum(chunks)),
        gradients=on_all(
            ranks, sum(size for size, unit in zip(chunks, asked.model.units, strict=True) if names & {*unit})
        ),
        masters=on_all(ranks, 0),
        **_gathering(asked, ranks),
    )


def _zero0(asked: Request) -> Placement:
    """Everything on every rank, and each steps all of it."""
    names = names_in(asked)
    trained, is_half = bytes_of(asked, names), asked.dtype.itemsize < 4
    masters = trained * 4 // asked.dtype.itemsize if is_half else 0
    return Placement(
        num_sharing=1,
        calls=({name: Replicated() for name in names},),
        stepped_dtype=torch.float32,
        weights=on_all(1, bytes_of(asked, asked.model.shapes)),
        gradients=on_all(1, trained + masters),
        masters=on_all(1, masters),
        buffers=min(ZERO_BUCKET * asked.dtype.itemsize, trained) if asked.num_ranks > 1 else 0,
        wire={"backward: all-reduce": 2 * away(trained, asked.num_ranks)},
    )


def _zero12(asked: Request) -> Placement:
    """A flat buffer for each param group, in equal partitions, whatever lies at the cuts."""
    ranks, shapes, itemsize = asked.num_ranks, asked.model.shapes, asked.dtype.itemsize
    calls, partitions = [], []
    for members in filter(None, asked.trained):
        total = sum(shapes[name].numel() for name in members)
        size = -(-total // (2 * ranks)) * 2
        partitions.append(size)
        at, layouts = 0, {}
        for name in members:
            layouts[name] = FlatRange.cut(shapes[name].numel(), size, ranks, at)
            at += shapes[name].numel()
        calls.append(layouts)
    # Gradients are kept whole where the partition has a part of them. Each call gets a copy in fp32, unless that is a
    # part of one tensor, in fp32 already, and needs no padding.
    kept, shown = on_all(ranks, 0), [on_all(ranks, 0)]
    for layouts, size in zip(calls, partitions, strict=True):
        count, numel = touched(layouts, shapes, ranks)
        kept += itemsize * numel
        count[-1] += size * ranks > sum(shapes[name].numel() for name in layouts)
        shown.append(4 * size * ((count > 1) | (itemsize < 4)))
    copies = torch.stack(shown)
    copies = copies.sum(0) if asked.needs_all else copies.max(0).values
    frozen = bytes_of(asked, [name for name in shapes if name not in set(names_in(asked))])
    own = sum(partitions)
    trained = bytes_of(asked, names_in(asked))
    return Placement(
        num_sharing=ranks,
        calls=tuple(calls),
        stepped_dtype=torch.float32,
        weights=on_all(ranks, own * ranks * itemsize + frozen),
        gradients=on_all(ranks, 4 * own) if asked.is_offloaded else kept + copies,
        masters=on_all(ranks, own * 4),
        buffers=2 * ZERO_BUCKET * itemsize if asked.strategy == "zero2" else ZERO_BUCKET * itemsize,
        wire={
            "backward: reduce-scatter": away(trained, ranks),
            "step: all-gather of weights": away(trained, ranks),
        },
    )


def _zero3(asked: Request) -> Placement:
    """Each parameter in equal parts; sub-groups of them are stepped one after the other."""
    ranks, shapes, itemsize = asked.num_ranks, asked.model.shapes, asked.dtype.itemsize
    part = {name: -(-shape.numel() // ranks) for name, shape in shapes.items()}
    cut = functools.cache(lambda numel: FlatRange.cut(numel, -(-numel // ranks), ranks))  # layers are alike
    calls: list[dict[str, Layout]] = []
    sizes: list[int] = []
    for members in filter(None, asked.trained):
        calls.append({})
        sizes.append(0)
        for name in members:
            if sizes[-1] >= ZERO_SUB_GROUP:
                calls.append({})
                sizes.append(0)
            calls[-1][name] = cut(shapes[name].numel())
            sizes[-1] += part[name]
    own = sum(sizes)
    # A sub-group of one tensor, in fp32 already, is shown where it lies.
    copied = [size for size, members in zip(sizes, calls, strict=True) if itemsize < 4 or len(members) > 1]
    shown = 4 * (own if asked.is_offloaded else sum(copied) if asked.needs_all else max(copied, default=0))
    gathering = _gathering(asked, ranks)
    persistent = sum(shape.numel() for shape in shapes.values() if shape.numel() < ZERO_PERSISTENT) * itemsize
    return Placement(
        num_sharing=ranks,
        calls=tuple(calls),
        stepped_dtype=torch.float32,
        weights=on_all(ranks, sum(part.values()) * itemsize),
        gradients=on_all(ranks, own * itemsize + shown),
        masters=on_all(ranks, own * 4),
        buffers=gathering["buffers"] + ZERO_BUCKET * itemsize + persistent,
        wire=gathering["wire"],
    )


_PLACES: dict[str, Callable[[Request], Placement]] = {
    "one": _replicated,
    "ddp": _replicated,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "hsdp": _fsdp2,
    "zero0": _zero0,
    "zero1": _zero12,
    "zero2": _zero12,
    "zero3": _zero3,
}


def _gathering(asked: Request, ranks: int) -> dict[str, Any]:
    """Units that are gathered for a moment: what is in no layer, two layers, and a layer's gradients twice."""
    if ranks == 1:
        return {"buffers": 0, "wire": {}}
    size = asked.precision.compute.itemsize
    shapes = asked.model.shapes
    units = [size * sum(shapes[name].numel() for name in unit) for unit in asked.model.units]
    layers, root = (units[:-1], units[-1]) if len(units) > 1 else (units, 0)
    total = sum(units)
    trained = size * sum(shapes[name].numel() for name in names_in(asked))
    wire = {
        "forward: all-gather": away(total, ranks),
        "backward: all-gather": away(total, ranks),
        "backward: reduce-scatter": away(trained, ranks),
    }
    replicas = asked.num_ranks // ranks
    if replicas > 1:
        wire["backward: all-reduce of replicas"] = 2 * away(trained // ranks, replicas)
    return {"buffers": root + 4 * max(layers), "wire": wire}
