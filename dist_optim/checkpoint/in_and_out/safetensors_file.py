"""A file of safetensors, written tensor by tensor: eight bytes of length, a header in JSON, and the bytes in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_optim.checkpoint.in_and_out.weights import DTYPES, Weights
from dist_optim.checkpoint.index import StoredTensor
from dist_optim.errors import UsageError

__all__ = ["written_as", "write_safetensors"]


def write_safetensors(path: Path, weights: Weights, dtype: torch.dtype | None = None) -> None:
    """Write all weights, holding no more than a batch of them.

    Args:
        path: A file that is not there yet.
        weights: What to write.
        dtype: Of the floating-point tensors in the file; None leaves each in its own.

    Raises:
        UsageError: A tensor has a dtype that the format does not know.
    """
    as_written = {name: StoredTensor(one.shape, written_as(one.dtype, dtype)) for name, one in weights.stored.items()}
    # The widest first: then each tensor begins at a multiple of its element's size, as readers that map it need.
    names = sorted(as_written, key=lambda name: -as_written[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        size = as_written[name].shape.numel() * as_written[name].dtype.itemsize
        header[name] = {
            "dtype": _text_of(name, as_written[name].dtype),
            "shape": list(as_written[name].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in weights.read(names):
            file.write(_bytes_of(tensor.to(as_written[name].dtype)))


def written_as(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor in the file."""
    return wanted if wanted is not None and own.is_floating_point else own


def _text_of(name: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise UsageError(
            f"{name!r} is of {dtype}, which safetensors does not know. Give --dtype, or convert it before."
        )
    return DTYPES[dtype]


def _bytes_of(tensor: Tensor) -> Any:
    """Its bytes in order, where they lie."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
