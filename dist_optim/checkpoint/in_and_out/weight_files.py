"""Files that hold a model's weights: safetensors, or a ``state_dict()`` of ``torch.save``; in one, or in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_optim.checkpoint.directory import read_json
from dist_optim.checkpoint.in_and_out.upstream_file import load_plain
from dist_optim.checkpoint.in_and_out.weights import HeldWeights, SafetensorsWeights, Weights
from dist_optim.errors import CheckpointError

__all__ = ["weights_at"]

BINARY, INDEX = ("pytorch_model.bin", "pytorch_model_fsdp.bin"), "pytorch_model.bin.index.json"


def weights_at(path: Path) -> Weights | None:
    """The weights in a folder, or in a file; None where there are none.

    Raises:
        CheckpointError: They are damaged, or pickled code.
    """
    if path.is_file():
        return SafetensorsWeights([path]) if path.suffix == ".safetensors" else _pickled([path])
    if files := _safetensors_in(path):
        return SafetensorsWeights(files)
    for name in BINARY:
        if (path / name).is_file():
            return _pickled([path / name])
    if (path / INDEX).is_file():
        return _pickled(_listed(path / INDEX))
    return None


def _pickled(files: list[Path]) -> Weights:
    tensors: dict[str, Tensor] = {}
    for path in files:
        found = load_plain(path)
        if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
            raise CheckpointError(
                f"{str(path)!r} holds more than tensors by name. Give a file of a model's state_dict()."
            )
        tensors |= found
    first: dict[Any, str] = {}
    for name, one in tensors.items():  # what is tied has a name for each place, and is one parameter
        first.setdefault((one.data_ptr(), one.shape, one.stride()) if one.numel() else name, name)
    return HeldWeights({name: tensors[name] for name in first.values()})


def _listed(index: Path) -> list[Path]:
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    if not names or not all(isinstance(one, str) and Path(one).name == one for one in names):
        raise CheckpointError(f"{str(index)!r} is damaged: it names no files of its folder.")
    return [index.parent / name for name in names]


def _safetensors_in(given: Path) -> list[Path]:
    """``model.safetensors``, or the files that its index names.

    Raises:
        CheckpointError: The index is damaged, or names a file outside the folder.
    """
    for stem in ("model", "adapter_model"):
        if (given / f"{stem}.safetensors").is_file():
            return [given / f"{stem}.safetensors"]
    index = given / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{str(index)!r} cannot be read: {type(error).__name__}: {error}.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (given / name).is_file():
            raise CheckpointError(f"{str(index)!r} names {name!r}, which is no file of its folder.")
    return [given / name for name in names]
