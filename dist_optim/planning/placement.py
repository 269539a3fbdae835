"""Where a strategy puts a model: what each rank holds of it, what is stepped where, and what the engine sends.

The arithmetic of the engines: DDP's copies, FSDP2's padded rows, FSDP1's flat units, DeepSpeed's flat partitions. A
test builds each engine and compares.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.layout import DimShard, FlatRange, Layout, chunk_of
from dist_optim.layouts.stack import Layer
from dist_optim.planning.model import PlannedModel

__all__ = [
    "OFFLOADED",
    "PRECISIONS",
    "STRATEGIES",
    "Placement",
    "Precision",
    "Request",
    "away",
    "bytes_of",
    "largest_of",
    "names_in",
    "numels_by_rank",
    "on_all",
    "touched",
]

STRATEGIES = ("one", "ddp", "fsdp1", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")
OFFLOADED = {"fsdp2_offload": "fsdp2", "zero2_offload": "zero2", "zero3_offload": "zero3"}
"""Strategies whose optimizer steps on the host, and what they are besides."""


@dataclass(frozen=True, slots=True)
class Precision:
    """In which dtype weights lie, products are computed, and, under DeepSpeed, the engine's weights lie."""

    weights: torch.dtype
    compute: torch.dtype
    under_zero: torch.dtype


PRECISIONS = {
    "mixed": Precision(torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32": Precision(torch.float32, torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
}
"""mixed: fp32 weights and bf16 products, as --bf16 trains; under DeepSpeed bf16 weights with fp32 masters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a placement is asked for."""

    model: PlannedModel
    strategy: str
    num_ranks: int
    num_nodes: int
    precision: Precision
    trained: Sequence[Sequence[str]]
    """Names of the trained parameters, param group by param group."""
    stores_gradients: bool = True
    """False where each is applied inside backward, and freed."""
    is_offloaded: bool = False
    """Whether DeepSpeed keeps masters and their gradients on the host."""
    needs_all: bool = False
    """Whether the optimizer steps all tensors in one call."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that the engine holds."""
        return self.precision.under_zero if self.strategy.startswith("zero") else self.precision.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Bytes are tensors with one number for each rank that shares the work; replicas of those hold the same."""

    num_sharing: int
    calls: tuple[Mapping[str, Layout], ...]
    """Layouts of what each step() of the optimizer gets: one, or one for each flat partition of DeepSpeed's."""
    stepped_dtype: torch.dtype
    weights: Tensor
    gradients: Tensor
    """Kept from backward to the step, and the fp32 copy that DeepSpeed makes for it."""
    masters: Tensor
    """fp32 weights that the engine itself keeps."""
    buffers: int
    """Of the engine, while it computes and reduces: an estimate, from its defaults."""
    wire: Mapping[str, int]
    """Bytes that a rank sends in a step for the engine itself, by phase."""


def numels_by_rank(layout: Layout, shape: torch.Size, ranks: int) -> Tensor:
    """Elements of a tensor on each rank."""
    if isinstance(layout, Layer):
        return _numels_of_layer(layout, shape, ranks)
    if isinstance(layout, FlatRange):
        numels = torch.tensor(layout.bounds, device="cpu").diff()
        return numels if layout.held is None else numels[list(layout.held.parts)]
    if isinstance(layout, BoxShard):
        ((dim, parts),) = layout.cuts
        rows = torch.tensor([chunk_of(shape[dim], parts, at)[1] for at in range(parts)], device="cpu")
        return rows[[at for (at,) in layout.chunks]] * (shape.numel() // max(1, shape[dim]))
    if isinstance(layout, DimShard) and shape[layout.dim]:
        size = shape[layout.dim]
        per_rank = -(-size // ranks)
        rows = (size - torch.arange(ranks, device="cpu") * per_rank).clamp(0, per_rank)
        return rows * (shape.numel() // size)
    return torch.full((ranks,), layout.numel_on(shape, 0), device="cpu")


@functools.cache
def _numels_of_layer(layout: Layer, shape: torch.Size, ranks: int) -> Tensor:
    """Layers of a model are alike; nobody writes to what is handed out."""
    return torch.tensor([layout.numel_on(shape, rank) for rank in range(ranks)], device="cpu")


def touched(layouts: Mapping[str, Layout], shapes: Mapping[str, torch.Size], ranks: int) -> tuple[Tensor, Tensor]:
    """How many tensors each rank has a part of, and their elements."""
    count, numel = on_all(ranks, 0), on_all(ranks, 0)
    for name, layout in layouts.items():
        is_here = numels_by_rank(layout, shapes[name], ranks) > 0
        count += is_here
        numel += is_here * shapes[name].numel()
    return count, numel


def names_in(asked: Request) -> list[str]:
    """Of all trained parameters, in group order."""
    return [name for members in asked.trained for name in members]


def bytes_of(asked: Request, names: Sequence[str] | Mapping[str, torch.Size]) -> int:
    """Of these parameters, as the engine holds them."""
    shapes = asked.model.shapes
    return asked.dtype.itemsize * sum(shapes[name].numel() for name in names)


def largest_of(asked: Request, names: Sequence[str]) -> int:
    """Bytes of the largest of them."""
    return max((bytes_of(asked, [name]) for name in names), default=0)


def away(nbytes: int, ranks: int) -> int:
    """Of an all-gather or reduce-scatter of so many bytes, what each rank sends."""
    return nbytes * (ranks - 1) // ranks


def on_all(ranks: int, nbytes: int) -> Tensor:
    """The same bytes on every rank."""
    return torch.full((ranks,), nbytes, dtype=torch.int64, device="cpu")
