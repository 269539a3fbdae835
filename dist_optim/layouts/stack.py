"""Matrices in parameters that are none: each of a stack ``[E, m, n]``, and the filters of a convolution as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.layout import DimShard, Elsewhere, FlatRange, Layout, chunk_of

__all__ = ["Filters", "Layer", "Member", "filters_of", "layer_of"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One matrix of a stack that is cut between its matrices too: some ranks hold a part of it, and others nothing."""

    stack: DimShard | BoxShard
    num_layers: int
    at: int

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def is_contiguous(self) -> bool:
        return not isinstance(self.stack, BoxShard) or all(dim < 2 for dim, _ in self.stack.cuts)

    @property
    def copies(self) -> int:
        return self.stack.copies

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        first, count = _layers_on(self.stack, self.num_layers, rank)
        if not first <= self.at < first + count:
            return full.view(-1)[:0]
        return self.stack.view_of(full.expand(self.num_layers, *full.shape), rank)[self.at - first]

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        first, count = _layers_on(self.stack, self.num_layers, rank)
        if not first <= self.at < first + count:
            return 0
        return self.stack.numel_on(torch.Size([self.num_layers, *shape]), rank) // count

    def fewest_rows(self, rows: int) -> int | None:
        return None

    def home(self, shape: torch.Size) -> int:
        cuts = self.stack.cuts if isinstance(self.stack, BoxShard) else ((self.stack.dim, self.stack.world_size),)
        first, count, chunks = 0, self.num_layers, []
        for dim, parts in cuts:
            chunk = 0 if dim else (self.at - first) // -(-count // parts)
            if dim == 0:
                start, count = chunk_of(count, parts, chunk)
                first += start
            chunks.append(chunk)
        return self.stack.first_with(tuple(chunks)) if isinstance(self.stack, BoxShard) else chunks[0]

    def holders(self, rank: int) -> Sequence[int]:
        return self.stack.holders(rank)

    def is_read(self, holder: int, owner: int) -> bool:
        return self.stack.is_read(holder, owner)


@dataclass(frozen=True, slots=True)
class Member:
    """Which matrix of the parameter's stack a ``PlacedParameter`` is."""

    stack: Layout
    shape: torch.Size
    """Of the stack."""
    at: int

    @property
    def number(self) -> str:
        """What its name has besides that of the stack."""
        return str(self.at)

    def out_of(self, full: Tensor) -> Tensor:
        """The matrix, out of the full stack."""
        return full[self.at]

    def part_of(self, local: Tensor, rank: int) -> Tensor:
        """This rank's part of the matrix, out of its part of the stack: on the same storage."""
        if isinstance(self.stack, FlatRange):
            numel, (begin, _) = self.shape[1:].numel(), self.stack.range_on(rank)
            start, end = ((self.at + more) * numel - begin for more in (0, 1))
            return local.reshape(-1)[max(start, 0) : max(end, 0)]
        if isinstance(self.stack, Elsewhere):
            return local
        first, count = _layers_on(self.stack, self.shape[0], rank)
        return local[self.at - first] if first <= self.at < first + count else local.reshape(-1)[:0]


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a convolution, ``[out, in, ...]``, as a matrix with a row each."""

    stack: Layout
    shape: torch.Size
    number: str = ""

    def out_of(self, full: Tensor) -> Tensor:
        return full.view(full.shape[0], self.shape[1:].numel())

    def part_of(self, local: Tensor, rank: int) -> Tensor:
        """This rank's part of the matrix, on the same storage: rows, or a range of a flattened parameter."""
        return local if local.ndim == 1 else self.out_of(local)


def filters_of(layout: Layout, shape: torch.Size, local: Tensor) -> Filters | None:
    """A convolution's weight as a matrix; None where its rows are cut, or do not lie one after the other."""
    dims = {layout.dim} if isinstance(layout, DimShard) else set()
    if isinstance(layout, BoxShard):
        dims = {dim for dim, _ in layout.cuts}
    return Filters(layout, shape) if dims <= {0} and local.is_contiguous() else None


def layer_of(layout: Layout, shape: torch.Size, at: int) -> Layout:
    """The layout of one matrix of a stack of this shape."""
    if isinstance(layout, FlatRange):
        numel = shape[1:].numel()
        return replace(layout, bounds=tuple(min(max(bound - at * numel, 0), numel) for bound in layout.bounds))
    if isinstance(layout, BoxShard) or (isinstance(layout, DimShard) and layout.dim == 0):
        return Layer(layout, shape[0], at)
    return DimShard(layout.dim - 1, layout.world_size) if isinstance(layout, DimShard) else layout


def _layers_on(layout: Layout, num_layers: int, rank: int) -> tuple[int, int]:
    """The first of the matrices that a rank holds a part of, and how many they are."""
    cuts: list[tuple[int, int, int]] = []
    if isinstance(layout, DimShard):
        cuts = [(layout.dim, layout.world_size, rank)]
    elif isinstance(layout, BoxShard):
        cuts = [(dim, parts, at) for (dim, parts), at in zip(layout.cuts, layout.chunks[rank], strict=True)]
    first, count = 0, num_layers
    for dim, parts, at in cuts:
        if dim == 0:
            start, count = chunk_of(count, parts, at)
            first += start
    return first, count
