"""Indexes of checkpoints, rewritten by somebody who knows what is in them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from damage import Damage

INDEXES = ("model/.metadata", "optimizer/tensors/.metadata")


def of_indexes() -> Iterator[Damage]:
    """Indexes rewritten, also with all digests made anew."""
    for name in INDEXES:
        for change in INDEX_CHANGES:
            for is_sealed in (True, False):
                yield Damage(f"{name}: {change}", partial(_edit_index, name, change), is_sealed)


def _first(index: Any) -> Any:
    return next(iter(index.storage_data.values()))


def _first_tensor(index: Any) -> Any:
    return next(entry for entry in index.state_dict_metadata.values() if len(entry.size))


def _each(index: Any, **values: Any) -> None:
    for info in index.storage_data.values():
        vars(info).update(values)


INDEX_CHANGES: dict[str, Callable[[Any], Any]] = {
    "a path outside": lambda index: _each(index, relative_path="../model/__0_0.distcp"),
    "an absolute path": lambda index: _each(index, relative_path="/etc/passwd"),
    "a path to a device": lambda index: _each(index, relative_path="/dev/zero"),
    "no path": lambda index: _each(index, relative_path=""),
    "a path that is a number": lambda index: _each(index, relative_path=3),
    "a file that is not there": lambda index: _each(index, relative_path="__7_0.distcp"),
    "an offset before the file": lambda index: vars(_first(index)).update(offset=-5),
    "an offset after the file": lambda index: vars(_first(index)).update(offset=10**14),
    "an offset that is a text": lambda index: vars(_first(index)).update(offset="1"),
    "another tensor's offset": lambda index: _each(index, offset=0),
    "no length": lambda index: vars(_first(index)).update(length=0),
    "a length below zero": lambda index: vars(_first(index)).update(length=-1),
    "a length of 10^14": lambda index: vars(_first(index)).update(length=10**14),
    "a size of 10^14": lambda index: vars(_first_tensor(index)).update(size=torch.Size([10**14])),
    "another size": lambda index: vars(_first_tensor(index)).update(size=torch.Size([1])),
    "a size that is a text": lambda index: vars(_first_tensor(index)).update(size="ab"),
    "a size and a block of 10^14": lambda index: (
        vars(_first_tensor(index)).update(size=torch.Size([10**14])),
        vars(_first_tensor(index).chunks[0]).update(sizes=torch.Size([10**14]), offsets=torch.Size([0])),
    ),
    "a block outside": lambda index: vars(_first_tensor(index).chunks[0]).update(offsets=torch.Size([7, 7])),
    "no blocks": lambda index: vars(_first_tensor(index)).update(chunks=[]),
    "a block twice": lambda index: _first_tensor(index).chunks.append(_first_tensor(index).chunks[0]),
    "another dtype": lambda index: vars(_first_tensor(index).properties).update(dtype=torch.float64),
    "no dtype": lambda index: vars(_first_tensor(index).properties).update(dtype=None),
    "a name less": lambda index: index.state_dict_metadata.pop(next(iter(index.state_dict_metadata))),
    "bytes less": lambda index: index.storage_data.pop(next(iter(index.storage_data))),
    "another name": lambda index: index.state_dict_metadata.update(
        other=index.state_dict_metadata.pop(next(iter(index.state_dict_metadata)))
    ),
    "a name that is a number": lambda index: index.state_dict_metadata.update({3: _first_tensor(index)}),
    "no names": lambda index: vars(index).update(state_dict_metadata={}),
    "names that are a list": lambda index: vars(index).update(state_dict_metadata=[1]),
    "no storage": lambda index: vars(index).update(storage_data=None),
    "a dict": lambda index: {"state_dict_metadata": {}},
    "nothing": lambda index: [],
}


def _edit_index(name: str, change: str, folder: Path) -> None:
    index = pickle.loads((folder / name).read_bytes())
    result = INDEX_CHANGES[change](index)
    is_other = isinstance(result, (dict, list)) and not hasattr(result, "size")
    (folder / name).write_bytes(pickle.dumps(result if is_other else index))
