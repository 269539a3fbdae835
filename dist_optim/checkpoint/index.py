"""The index of a folder of tensors: read without running what is in it, and found to describe tensors that can be.

``torch.distributed.checkpoint`` writes the index as a pickle, which may name any function to be called. Here it is read
by an unpickler that finds the index's own classes and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from dist_optim.checkpoint.archive import looks_kept, read_rows
from dist_optim.checkpoint.directory import contents
from dist_optim.errors import CheckpointError

__all__ = ["INDEX", "Extent", "IndexReader", "StoredTensor", "extents", "indexes_kept", "stored_tensors"]

INDEX = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Shape and dtype of a tensor in the files."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one block of a tensor lies: an archive inside a file."""

    file: str
    """Its name."""
    offset: int
    length: int
    """In bytes."""
    shape: torch.Size
    """Of the block."""
    dtype: torch.dtype


_kept: dict[bytes, Metadata] | None = None
"""By their content, while a load lasts."""


@contextmanager
def indexes_kept() -> Iterator[None]:
    """Inside, an index is unpickled once, however often it is read. It takes seconds where thousands of ranks wrote.

    So is what it says of a tensor that was checked (``looks_kept``).
    """
    global _kept
    before, _kept = _kept, {}
    try:
        with looks_kept():
            yield
    finally:
        _kept = before


class IndexReader(dcp.FileSystemReader):
    """torch's reader, with an index that cannot run code, nor lead out of its folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        content = contents(path)
        if _kept is not None and content in _kept:
            return _kept[content]
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("the index is not one of torch.distributed.checkpoint")
        for info in metadata.storage_data.values():
            name = getattr(info, "relative_path", None)
            if not isinstance(name, str) or name in ("", "..") or PurePosixPath(name).name != name:
                raise ValueError(f"it names {name!r}, which is no file of the folder")
        about = getattr(metadata, "storage_meta", None) or StorageMeta()
        about.load_id, metadata.storage_meta = self.load_id, about
        if _kept is not None:
            _kept[content] = metadata
        return metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """Whole rows are read straight into place; what else there is, by torch."""
        left = [item for item in plan.items if not self._read_straight(item, planner)]
        return super().read_data(replace(plan, items=left), planner)

    def _read_straight(self, item: ReadItem, planner: dcp.LoadPlanner) -> bool:
        info = self.storage_data[item.storage_index]
        if item.type is LoadItemType.BYTE_IO or info.transform_descriptors or any(item.storage_offsets[1:]):
            return False
        target = planner.resolve_tensor(item).detach()
        first_row = item.storage_offsets[0] if item.storage_offsets else 0
        with (Path(self.path) / info.relative_path).open("rb", buffering=0) as file:
            if target.shape != item.lengths or not read_rows(file, info.offset, info.length, first_row, target):
                return False
        planner.commit_tensor(item, target)
        return True


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath", "PurePosixPath"):
            return PurePosixPath  # where the folder was when it was written
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint needs")


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of the tensors in a folder. Not a collective.

    Raises:
        CheckpointError: It holds no complete set of tensors.
    """
    return {
        name: StoredTensor(entry.size, entry.properties.dtype)
        for name, entry in _index_of(directory).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def extents(directory: Path) -> dict[str, list[Extent]]:
    """Where the tensors lie: of each file, by its name, in the order in which they lie there. Not a collective.

    Raises:
        CheckpointError: The index describes what cannot be.
    """
    index = _index_of(directory)
    try:
        found = _extents(index)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The index of {str(directory)!r} is damaged: {type(error).__name__}: {error}. Resume from another "
            "checkpoint."
        ) from error
    by_file: dict[str, list[Extent]] = {}
    for extent in sorted(found, key=lambda one: (one.file, one.offset)):
        by_file.setdefault(extent.file, []).append(extent)
    return by_file


def _extents(index: Metadata) -> list[Extent]:
    """One for each block of each tensor, when the blocks make up the tensor and the files have room for them."""
    left = dict(index.storage_data)
    made = []
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):  # of others' checkpoints
            left = {index: info for index, info in left.items() if index.fqn != name}
            continue
        size, dtype = torch.Size(entry.size), entry.properties.dtype
        if sum(_numel_in(chunk, size) for chunk in entry.chunks) != size.numel() or not all(n >= 0 for n in size):
            raise ValueError(f"the blocks of {name!r} do not make up a tensor of shape {tuple(size)}")
        for chunk in entry.chunks:
            info = left.pop(MetadataIndex(name, chunk.offsets))
            shape = torch.Size(chunk.sizes)
            if type(info.offset) is not int or type(info.length) is not int:
                raise ValueError(f"{name!r} has {info.length!r} bytes at {info.offset!r}")
            extent = Extent(str(info.relative_path), info.offset, info.length, shape, dtype)
            if extent.offset < 0 or extent.length < shape.numel() * dtype.itemsize:
                raise ValueError(f"{name!r} has {extent.length} bytes at {extent.offset}")
            made.append(extent)
    if left:
        raise ValueError(f"it names bytes of {next(iter(left)).fqn!r}, and no such tensor")
    return made


def _numel_in(chunk: ChunkStorageMetadata, size: torch.Size) -> int:
    """Elements of a block that lies inside a tensor of this size."""
    for start, length, end in zip(chunk.offsets, chunk.sizes, size, strict=True):
        if not 0 <= start <= start + length <= end:
            raise ValueError(f"a block of {tuple(chunk.sizes)} at {tuple(chunk.offsets)} is outside {tuple(size)}")
    return torch.Size(chunk.sizes).numel()


def _index_of(directory: Path) -> Metadata:
    try:
        return IndexReader(directory).read_metadata()
    except CheckpointError:
        raise
    except Exception as error:  # a truncated pickle raises almost anything
        text = str(error).splitlines()[0] if str(error) else ""
        raise CheckpointError(
            f"{str(directory)!r} holds no complete checkpoint: {type(error).__name__}: {text}. Give a folder that was "
            "saved to its end."
        ) from error
