"""The index of a folder of tensors: read without running what is in it, and its tensors proven to be there.

``torch.distributed.checkpoint`` writes the index as a pickle, which may name any function to be called. Here it is read
by an unpickler that finds the index's own classes and nothing else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dist_optim.errors import CheckpointError

__all__ = ["IndexReader", "StoredTensor", "check_files", "stored_tensors"]

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


class IndexReader(dcp.FileSystemReader):
    """torch's reader, with an index that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("the index is not one of torch.distributed.checkpoint")
        about = getattr(metadata, "storage_meta", None) or StorageMeta()
        about.load_id, metadata.storage_meta = self.load_id, about
        return metadata


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


def check_files(directory: Path, rank: int, num_ranks: int) -> None:
    """Prove that the files hold every tensor that the index names, unchanged since they were written.

    Not a collective: ranks share the work. Every rank looks for all files, and reads its share of the tensors to
    compare them with their checksums (CRC-32, which torch writes and does not look at).

    Raises:
        CheckpointError: With the file that is missing or damaged.
    """
    infos = sorted(_index_of(directory).storage_data.values(), key=lambda info: (info.relative_path, info.offset))
    _check_sizes(directory, infos)
    for info in infos[rank::num_ranks]:
        path = directory / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                bad = archive.testzip()
        except Exception as error:  # a damaged archive raises almost anything
            bad = f"{type(error).__name__}: {error}"
        if bad is not None:
            raise CheckpointError(
                f"{str(path)!r} is damaged: a tensor at byte {info.offset} is not what was written ({bad}). Resume "
                "from another checkpoint."
            )


def _check_sizes(directory: Path, infos: Iterable[Any]) -> None:
    ends: dict[str, int] = {}
    for info in infos:
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = directory / name
        if name != path.name or not path.is_file() or path.stat().st_size < end:
            raise CheckpointError(
                f"{str(path)!r} is missing or damaged: the index of {str(directory)!r} names {end} bytes of it. Resume "
                "from another checkpoint."
            )


def _index_of(directory: Path) -> Metadata:
    try:
        return IndexReader(directory).read_metadata()
    except Exception as error:  # a truncated pickle raises almost anything
        text = str(error).splitlines()[0] if str(error) else ""
        raise CheckpointError(
            f"{str(directory)!r} holds no complete checkpoint: {type(error).__name__}: {text}. Give a folder that was "
            "saved to its end."
        ) from error
