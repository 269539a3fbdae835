"""Whether two values are equal to the bit: tensors, numbers, and what lists and dictionaries hold of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["same"]


def same(one: Any, other: Any) -> bool:
    """Whether nobody who computes with them could tell them apart.

    Types, shapes and dtypes are equal, and every bit: -0.0 is not 0.0. What is not a number is equal to what is not a
    number. Devices and strides do not count.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same_tensor(one.detach(), other.detach())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one.hex() == other.hex() if isinstance(one, float) else bool(one == other)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)
    if torch.equal(_bits(one), _bits(other)):
        return True
    if not one.is_floating_point():
        return False
    mine, theirs = one.double(), other.double()  # each dtype's values, exactly
    is_number = ~(mine.isnan() & theirs.isnan())
    return torch.equal(_bits(mine[is_number]), _bits(theirs[is_number]))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
