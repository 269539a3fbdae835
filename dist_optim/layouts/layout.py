"""Which part of a full parameter each rank holds: frozen arithmetic, testable in one process.

A layout answers one question, ``view_of(full, rank)``: the view of the full tensor that this rank stores. Packing reads
through it, unpacking writes through it, tests cut their references with it. ``numel_on`` and ``home`` answer from the
shape alone what planners ask of thousands of ranks: how many elements a rank stores, and who stores most of a tensor.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dist_optim.layouts.holders import Holders

__all__ = ["Box", "DimShard", "Elsewhere", "FlatRange", "Layout", "Replicated", "boxes_on", "chunk_of"]


class Box(NamedTuple):
    """A block of a tensor: where it starts in each dim, and how long it is there."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Layout(Protocol):
    """The part of one parameter that each rank of a process group holds."""

    @property
    def is_replicated(self) -> bool:
        """Every rank holds the full tensor."""
        ...

    @property
    def is_contiguous(self) -> bool:
        """Whether a rank's part lies together in the memory of the full tensor."""
        ...

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        """The view of ``full`` that ``rank`` stores; may be empty."""
        ...

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        """Elements of a tensor of this shape that ``rank`` stores."""
        ...

    def fewest_rows(self, rows: int) -> int | None:
        """Of a tensor of so many rows, the fewest that a rank holds; None where it is not cut into whole rows alone."""
        ...

    def home(self, shape: torch.Size) -> int:
        """The rank that stores the middle of the tensor: whoever stores more than half of it, if anybody does."""
        ...

    @property
    def copies(self) -> int:
        """How many ranks of the group hold each part of a tensor that is cut."""
        ...

    def holders(self, rank: int) -> Sequence[int]:
        """The ranks, in order, that hold the part that ``rank`` holds of a tensor that is cut."""
        ...

    def is_read(self, holder: int, owner: int) -> bool:
        """Whether the owner of a tensor gets this holder's part of it: of each part, one copy."""
        ...


def chunk_of(size: int, parts: int, at: int) -> tuple[int, int]:
    """Start and length of a chunk, as ``torch.chunk`` cuts so many parts; the last ones may be empty."""
    length = -(-size // parts)
    start = min(at * length, size)
    return start, min(length, size - start)


class _Once:
    """Layouts of which no two ranks hold the same part."""

    __slots__ = ()

    @property
    def copies(self) -> int:
        return 1

    def fewest_rows(self, rows: int) -> int | None:
        return None

    def holders(self, rank: int) -> Sequence[int]:
        return (rank,)

    def is_read(self, holder: int, owner: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Replicated(_Once):
    """Every rank holds the full tensor (DDP, or one process)."""

    @property
    def is_replicated(self) -> bool:
        return True

    @property
    def is_contiguous(self) -> bool:
        return True

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        return full

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        return shape.numel()

    def home(self, shape: torch.Size) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class DimShard(_Once):
    """Contiguous chunks of one tensor dim, as FSDP2's ``Shard(dim)`` lays them out; trailing ranks may be empty."""

    dim: int
    world_size: int

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def is_contiguous(self) -> bool:
        return self.dim == 0

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        return full.narrow(self.dim, *chunk_of(full.size(self.dim), self.world_size, rank))

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        size = shape[self.dim]
        return shape.numel() // size * chunk_of(size, self.world_size, rank)[1] if size else 0

    def fewest_rows(self, rows: int) -> int | None:
        return None if self.dim else chunk_of(rows, self.world_size, self.world_size - 1)[1]

    def home(self, shape: torch.Size) -> int:
        size = shape[self.dim]
        return size // 2 // chunk_of(size, self.world_size, 0)[1] if size else 0


@dataclass(frozen=True, slots=True)
class FlatRange(_Once):
    """Contiguous ranges of the flattened tensor, which may cut a row: the r-th is ``[bounds[r], bounds[r + 1])``."""

    bounds: tuple[int, ...]
    held: Holders | None = None
    """Which range each rank holds, where several hold the same one (FSDP1's hybrid strategies); None: r the r-th."""

    @classmethod
    def cut(cls, numel: int, chunk: int, world_size: int, start: int = 0) -> FlatRange:
        """The ranges of a tensor that begins at ``start`` of a buffer which is cut into chunks of equal size."""
        first, last = min(-(-start // chunk), world_size), min((start + numel) // chunk + 1, world_size)
        inside = (r * chunk - start for r in range(first, last))
        # Most ranks of many lie before the tensor or behind it: they are not computed one by one.
        return cls((*(0,) * first, *(min(bound, numel) for bound in inside), *(numel,) * (world_size + 1 - last)))

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def is_contiguous(self) -> bool:
        return True

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        start, end = self.range_on(rank)
        return full.view(-1)[start:end]

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        start, end = self.range_on(rank)
        return end - start

    def range_on(self, rank: int) -> tuple[int, int]:
        """Start and end of what ``rank`` holds."""
        at = rank if self.held is None else self.held.parts[rank]
        return self.bounds[at], self.bounds[at + 1]

    def __repr__(self) -> str:
        """Short for many ranks: ranks compare layouts by this text."""
        shown = self.bounds if len(self.bounds) < 20 else f"{len(self.bounds) - 1} ranks, {hash(self.bounds):x}"
        return f"FlatRange({shown})" if self.held is None else f"FlatRange({shown}, held={self.held})"

    def home(self, shape: torch.Size) -> int:
        at = min(bisect_right(self.bounds, shape.numel() // 2), len(self.bounds) - 1) - 1
        return at if self.held is None else self.held.of_part[at][0]

    @property
    def copies(self) -> int:
        return 1 if self.held is None else len(self.held.parts) // (len(self.bounds) - 1)

    def holders(self, rank: int) -> Sequence[int]:
        return (rank,) if self.held is None else self.held.alike(rank)

    def is_read(self, holder: int, owner: int) -> bool:
        return self.held is None or self.held.are_of_one_copy(holder, owner)


@dataclass(frozen=True, slots=True)
class Elsewhere(_Once):
    """Nowhere in reach: another optimizer of the same model steps the tensor, and it only keeps its position here."""

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def is_contiguous(self) -> bool:
        return True

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        return full.view(-1)[:0]

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        return 0

    def home(self, shape: torch.Size) -> int:
        return 0


def boxes_on(layout: Layout, shape: torch.Size, rank: int) -> list[Box]:
    """The blocks that make up what ``rank`` holds of a tensor of this shape, in the order of its storage.

    A range of the flattened tensor that cuts rows is several blocks; a rank that holds nothing has none.
    """
    if isinstance(layout, FlatRange):
        return _boxes_of_range(tuple(shape), *layout.range_on(rank))
    view = layout.view_of(torch.empty(shape, device="meta"), rank)
    if view.numel() == 0:
        return []
    offset, offsets = view.storage_offset(), []
    for stride in view.stride():  # of the full tensor, which is contiguous: strides fall, so this reads off digits
        offsets.append(offset // stride)
        offset %= stride
    return [Box(tuple(offsets), tuple(view.shape))]


def _boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Blocks of the elements ``start <= i < end`` of a contiguous tensor."""
    if start >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), end // row
    if first_whole > end_whole:  # inside one row
        return _inside_row(shape, end_whole, start - end_whole * row, end - end_whole * row)
    boxes = _inside_row(shape, first_whole - 1, start - (first_whole - 1) * row, row) if start % row else []
    if first_whole < end_whole:
        boxes.append(Box((first_whole,) + (0,) * (len(shape) - 1), (end_whole - first_whole, *shape[1:])))
    return boxes + _inside_row(shape, end_whole, 0, end - end_whole * row)


def _inside_row(shape: tuple[int, ...], index: int, start: int, end: int) -> list[Box]:
    inner = _boxes_of_range(shape[1:], start, end)
    return [Box((index, *box.offsets), (1, *box.sizes)) for box in inner]
