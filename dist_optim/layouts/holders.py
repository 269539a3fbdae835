"""Which ranks hold the same part of a tensor: the replicas of HSDP, or those along an axis that does not cut it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Holders"]

MOST_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Holders:
    """Which part each rank of a process group holds; of every part as many ranks hold a copy."""

    parts: tuple[Any, ...]
    of_part: Mapping[Any, Sequence[int]] = field(init=False, repr=False, compare=False)
    """The ranks, in order, that hold a part."""
    copy: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """For each rank, how many before it hold the same part: ranks of one replica have the same number."""

    def __post_init__(self) -> None:
        of_part: dict[Any, list[int]] = {}
        copy = []
        for rank, part in enumerate(self.parts):
            alike = of_part.setdefault(part, [])
            copy.append(len(alike))
            alike.append(rank)
        object.__setattr__(self, "of_part", of_part)
        object.__setattr__(self, "copy", tuple(copy))

    def alike(self, rank: int) -> Sequence[int]:
        """The ranks, in order, that hold what this one holds."""
        return self.of_part[self.parts[rank]]

    def are_of_one_copy(self, one: int, other: int) -> bool:
        """Whether two ranks belong to the same replica."""
        return self.copy[one] == self.copy[other]

    def __repr__(self) -> str:
        """Short for many ranks: ranks compare layouts by this text."""
        few = len(self.parts) <= MOST_SHOWN
        return repr(self.parts) if few else f"{len(self.parts)} ranks, {hash(self.parts):x}"
