"""Which part of a full parameter each rank holds: frozen arithmetic, testable in one process.

A layout answers one question, ``view_of(full, rank)``: the view of the full tensor that this rank stores. Packing reads
through it, unpacking writes through it, tests cut their references with it, and on a meta tensor it gives split sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DimShard", "Elsewhere", "FlatRange", "Layout", "Replicated", "numel_on"]


class Layout(Protocol):
    """The part of one parameter that each rank of a process group holds."""

    @property
    def is_replicated(self) -> bool:
        """Every rank holds the full tensor."""
        ...

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        """The view of ``full`` that ``rank`` stores; may be empty."""
        ...


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the full tensor (DDP, or one process)."""

    @property
    def is_replicated(self) -> bool:
        return True

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        return full


@dataclass(frozen=True, slots=True)
class DimShard:
    """Contiguous chunks of one tensor dim, as FSDP2's ``Shard(dim)`` lays them out; trailing ranks may be empty."""

    dim: int
    world_size: int

    @property
    def is_replicated(self) -> bool:
        return False

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        size = full.size(self.dim)
        per_rank = -(-size // self.world_size)  # ceil, as torch.chunk does
        start = min(rank * per_rank, size)
        return full.narrow(self.dim, start, min(per_rank, size - start))


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Contiguous ranges of the flattened tensor, which may cut a row: rank r holds ``[bounds[r], bounds[r + 1])``."""

    bounds: tuple[int, ...]

    @property
    def is_replicated(self) -> bool:
        return False

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        return full.view(-1)[self.bounds[rank] : self.bounds[rank + 1]]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Nowhere in reach: another optimizer of the same model steps the tensor, and it only keeps its position here."""

    @property
    def is_replicated(self) -> bool:
        return False

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        return full.view(-1)[:0]


def numel_on(layout: Layout, shape: torch.Size, rank: int) -> int:
    """Elements of a tensor of this shape that ``rank`` holds."""
    return layout.view_of(torch.empty(shape, device="meta"), rank).numel()
