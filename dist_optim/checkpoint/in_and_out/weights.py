"""Named weights that are read when they are asked for, whatever kind of file they lie in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_optim.checkpoint.blocks import Pieces, read_pieces
from dist_optim.checkpoint.index import StoredTensor, stored_tensors
from dist_optim.checkpoint.seals import check_files
from dist_optim.errors import CheckpointError, MissingPackageError

__all__ = ["DTYPES", "HeldWeights", "LogicalWeights", "OverlaidWeights", "SafetensorsWeights", "Weights", "pairs"]

BATCH_BYTES = 256 << 20
"""Read at a time, so that the host never holds all weights."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""What safetensors calls them."""


class Weights(Protocol):
    """Tensors by name: what they are, and the tensors themselves one after the other."""

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Shape and dtype of each."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in this order."""
        ...

    def check(self) -> None:
        """Prove that the files are whole.

        Raises:
            CheckpointError: They are not.
        """
        ...


class LogicalWeights:
    """A folder of ``torch.distributed.checkpoint``.

    Args:
        directory: The folder.
        prefix: What stands before each name in it.
        only: Names by which the others are known outside, for a part of what is there.
        sealed: The folder's seal, where there is a record of it.
    """

    def __init__(
        self,
        directory: Path,
        prefix: str = "",
        only: Mapping[str, str] | None = None,
        sealed: dict[str, Any] | None = None,
    ) -> None:
        self._directory, self._sealed = directory, sealed
        found = stored_tensors(directory)
        inside = {name: prefix + name for name in _without(prefix, found)} if only is None else dict(only)
        self._inside = inside
        self.stored: Mapping[str, StoredTensor] = {name: found[inner] for name, inner in inside.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in this order."""
        for batch in _batches(names, self.stored):
            rooms = {
                name: torch.empty(self.stored[name].shape, dtype=self.stored[name].dtype, device="cpu")
                for name in batch
            }
            pieces = {self._inside[name]: Pieces.whole(room) for name, room in rooms.items()}
            read_pieces(self._directory, pieces, None)
            yield from rooms.items()

    def check(self) -> None:
        """Compare every tensor with its checksum."""
        check_files(self._directory, 0, 1, self._sealed)


class SafetensorsWeights:
    """Files of safetensors.

    Args:
        files: Together they hold the weights.

    Raises:
        CheckpointError: One is damaged.
        MissingPackageError: safetensors is not installed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        stored: dict[str, StoredTensor] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  no mapping
                    about = file.get_slice(name)
                    stored[name] = StoredTensor(torch.Size(about.get_shape()), _dtype_of(file, name, about))
                    self._file_of[name] = path
        self.stored: Mapping[str, StoredTensor] = stored

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in this order; each is on the file's pages."""
        for name in names:
            with _opened(self._file_of[name]) as file:
                yield name, file.get_tensor(name)

    def check(self) -> None:
        """Nothing: the format has no checksums, and opening a file compares its length with its header."""


@dataclass(frozen=True)
class HeldWeights:
    """Tensors that are in memory, or on the pages of a file that torch has mapped."""

    tensors: Mapping[str, Tensor]

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Shape and dtype of each."""
        return {name: StoredTensor(tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in this order."""
        return ((name, self.tensors[name]) for name in names)

    def check(self) -> None:
        """Nothing: they were read."""


@dataclass(frozen=True)
class OverlaidWeights:
    """Weights of which some are taken from elsewhere."""

    below: Weights
    above: Weights

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Shape and dtype of each."""
        return {**self.below.stored, **self.above.stored}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in this order."""
        wanted = list(names)
        over = self.above.read([name for name in wanted if name in self.above.stored])
        under = self.below.read([name for name in wanted if name not in self.above.stored])
        return (next(over if name in self.above.stored else under) for name in wanted)

    def check(self) -> None:
        """Both."""
        self.below.check()
        self.above.check()


def pairs(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """All of them."""
    return weights.read(weights.stored)


def _without(prefix: str, names: Iterable[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _batches(names: Iterable[str], stored: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name in names:
        own = stored[name].shape.numel() * stored[name].dtype.itemsize
        if batch and size + own > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += own
    if batch:
        yield batch


def _opened(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingPackageError(
            f"{str(path)!r} is of safetensors, which cannot be imported here ({error}). pip install safetensors"
        ) from error
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or missing: {error}. Take another checkpoint.") from error


def _dtype_of(file: Any, name: str, about: Any) -> torch.dtype:
    known = next((dtype for dtype, text in DTYPES.items() if text == about.get_dtype()), None)
    return file.get_tensor(name).dtype if known is None else known
