"""Memory of the rounds on the host: taken in the first steps, and used again in all others.

glibc gives large blocks back to the system as soon as they are freed, and takes them anew page by page: that costs more
than the copies into them. On an accelerator torch keeps freed blocks itself, for whoever asks next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_optim.exchange.route import Item

__all__ = ["Room", "Rooms", "as_if_alone"]

ALIGNMENT = 64
"""Bytes; of torch's allocations on the CPU. Matrix products round by alignment, and on a GPU sums do."""


class Rooms:
    """Blocks that no round uses now. There come to be as many as are used at once, as large as the largest."""

    def __init__(self) -> None:
        self._free: dict[torch.dtype, list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The smallest free block that is large enough; where there is none, a new one in place of a smaller one."""
        free = self._free.setdefault(dtype, [])
        fitting = [block for block in free if block.numel() >= numel]
        if fitting:
            block = min(fitting, key=Tensor.numel)
            free[:] = [one for one in free if one is not block]
            return block
        if free:
            smallest = min(free, key=Tensor.numel)
            free[:] = [one for one in free if one is not smallest]
        return torch.empty(numel, dtype=dtype, device="cpu")

    def give_back(self, block: Tensor) -> None:
        """Let later rounds have it."""
        self._free[block.dtype].append(block)


class Room:
    """What one round takes, until ``close()``.

    Args:
        rooms: Where it takes from; None for new memory, which lives as long as its tensors.
    """

    def __init__(self, rooms: Rooms | None = None) -> None:
        self._rooms = rooms
        self._taken: list[Tensor] = []

    def flat(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Elements without values, in one dim."""
        if self._rooms is None or device.type != "cpu" or not numel:
            return torch.empty(numel, dtype=dtype, device=device)
        block = self._rooms.take(numel, dtype)
        self._taken.append(block)
        return block[:numel]

    def tensors(self, items: Sequence[Item], dtype: torch.dtype, device: torch.device) -> dict[int, Tensor]:
        """A full tensor for each item, without values, aligned as one of its own."""
        if self._rooms is None or device.type != "cpu":
            return {item.index: torch.empty(item.shape, dtype=dtype, device=device) for item in items}
        step = ALIGNMENT // dtype.itemsize
        sizes = [-(-item.shape.numel() // step) * step for item in items]
        pieces = self.flat(sum(sizes), dtype, device).split(sizes) if items else ()
        return {
            item.index: piece[: item.shape.numel()].view(item.shape) for item, piece in zip(items, pieces, strict=True)
        }

    def close(self) -> None:
        """Let others have the memory: nothing of it is in flight, or in anybody's view.

        A round that fails is not closed, and what it has taken is nobody's any more.
        """
        if self._rooms is not None:
            for block in self._taken:
                self._rooms.give_back(block)
        self._taken = []


def as_if_alone(gradient: Tensor) -> Tensor:
    """The gradient on storage as aligned as a tensor's own, so that what is computed from it rounds alike.

    A gradient inside a bucket begins anywhere.
    """
    return gradient if gradient.data_ptr() % ALIGNMENT == 0 else gradient.clone()
