"""The box of a tensor that several mesh axes cut out, one after the other: FSDP2 over tensor parallelism, say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_optim.layouts.holders import Holders
from dist_optim.layouts.layout import chunk_of

__all__ = ["BoxShard"]


@dataclass(frozen=True, slots=True)
class BoxShard:
    """One box a rank: each cut takes a chunk of what the cuts before it have left, as ``torch.chunk`` counts chunks.

    Several ranks may hold the same box: those along an axis that does not cut the tensor.
    """

    cuts: tuple[tuple[int, int], ...]
    """The dim and the number of chunks of each cut, in the order of cutting."""
    chunks: tuple[tuple[int, ...], ...]
    """For each rank of the process group, which chunk of each cut it holds."""
    held: Holders = field(init=False, repr=False, compare=False)
    """By whom."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", Holders(self.chunks))

    @property
    def is_replicated(self) -> bool:
        return False

    @property
    def is_contiguous(self) -> bool:
        return all(dim == 0 for dim, _ in self.cuts)

    @property
    def copies(self) -> int:
        return len(self.chunks) // math.prod(parts for _, parts in self.cuts)

    def view_of(self, full: Tensor, rank: int) -> Tensor:
        for (dim, parts), at in zip(self.cuts, self.chunks[rank], strict=True):
            full = full.narrow(dim, *chunk_of(full.size(dim), parts, at))
        return full

    def numel_on(self, shape: torch.Size, rank: int) -> int:
        sizes = list(shape)
        for (dim, parts), at in zip(self.cuts, self.chunks[rank], strict=True):
            _, sizes[dim] = chunk_of(sizes[dim], parts, at)
        return math.prod(sizes)

    def fewest_rows(self, rows: int) -> int | None:
        for dim, parts in self.cuts:
            if dim:
                return None
            _, rows = chunk_of(rows, parts, parts - 1)
        return rows

    def home(self, shape: torch.Size) -> int:
        return self.first_with((0,) * len(self.cuts))  # no chunk is larger than the first

    def first_with(self, chunks: tuple[int, ...]) -> int:
        """The first rank that holds this chunk of each cut."""
        return self.held.of_part[chunks][0]

    def holders(self, rank: int) -> Sequence[int]:
        return self.held.alike(rank)

    def is_read(self, holder: int, owner: int) -> bool:
        return self.held.are_of_one_copy(holder, owner)

    def __repr__(self) -> str:
        """Short for many ranks: ranks compare layouts by this text."""
        return f"BoxShard(cuts={self.cuts}, chunks={self.held})"
