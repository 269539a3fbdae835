"""Copies between tensors and the flat buffers in which they travel: many in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["copy", "cut", "shaped", "write_back"]


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target."""
    if targets:
        torch._foreach_copy_(targets, sources)


def cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the buffer, one after the other, in these shapes."""
    if not like:
        return []
    sizes = [part.numel() for part in like]
    return [piece.view(part.shape) for piece, part in zip(flat[: sum(sizes)].split(sizes), like, strict=True)]


def shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in this shape: an engine that flattens parameters does so for one rank too."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def write_back(full: Mapping[int, Tensor], local: Mapping[int, Tensor]) -> None:
    """Copy where upstream put the new values into other storage (some optimizers rebind ``.data``)."""
    moved = [
        index
        for index, tensor in full.items()
        if tensor is not local[index] and tensor.data_ptr() != local[index].data_ptr()
    ]
    copy([local[index] for index in moved], [shaped(full[index], local[index].shape) for index in moved])
