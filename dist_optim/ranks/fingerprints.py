"""A number that stands for a tensor's bits: cheap to compute, compared between ranks or between two moments."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fingerprint"]

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> int:
    """The wrapping integer sum of the tensor's bits: any change of one element changes it. One pass, one sync."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return int(tensor.detach().contiguous().view(_INTEGER_OF_SIZE[tensor.element_size()]).sum(dtype=torch.int64))
