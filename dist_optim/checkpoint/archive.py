"""One tensor as ``torch.save`` writes it: where in the file its numbers lie, found without running what is in it.

An archive is a zip file in which nothing is compressed: a small pickle that describes the tensor, its numbers, and
some smaller entries. What the pickle may name is listed here; another one is left to ``torch.load``.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["Part", "Stored", "begin_of", "look_into", "looks_kept", "part_of", "read_rows"]

HEADER, LENGTHS = 30, 26
"""Bytes of what precedes an entry's name, and where in it the lengths of the name and of what follows it are."""
MAX_PICKLE = 4096
SMALL = 1 << 20
"""Bytes of an archive that is read at once: its parts are then found in memory, in a third of the time."""
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""By the names that the pickle has for them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor whose numbers lie side by side."""

    begin: int
    """Where they do, in the archive."""
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def is_in_order(self) -> bool:
        """Whether they lie in the order of the dims."""
        return _lie_so(self.shape, self.stride, range(len(self.shape)))

    @property
    def has_no_gaps(self) -> bool:
        """Whether they lie in the order of the dims, or in that of a permutation of them."""
        return _lie_so(self.shape, self.stride, sorted(range(len(self.shape)), key=lambda dim: -self.stride[dim]))


def _lie_so(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            return False
        expected *= shape[dim]
    return True


class Part(io.RawIOBase):
    """A part of a file as a file: nothing outside it is read, and no more at once than is asked for.

    Args:
        file: The file.
        offset: Where the part begins in it.
        length: Of the part, in bytes.
    """

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        """Not by way of ``readinto``, as the base class does it: that copies twice."""
        left = max(0, self._length - self._at)
        self._file.seek(self._offset + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content

    def readinto(self, buffer: Any, /) -> int:
        length = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        count: int = self._file.readinto(memoryview(buffer)[:length])  # type: ignore[attr-defined]  # as in read_rows
        self._at += count
        return count


def part_of(file: BinaryIO, offset: int, length: int) -> io.IOBase:
    """As ``Part``; a small one is in memory."""
    if length > SMALL:
        return Part(file, offset, length)
    file.seek(offset)
    return io.BytesIO(file.read(length))


def begin_of(entry: zipfile.ZipInfo, part: io.IOBase) -> int:
    """Where in the archive the content of an entry begins."""
    part.seek(entry.header_offset + LENGTHS)
    return entry.header_offset + HEADER + sum(struct.unpack("<HH", part.read(4)))


_kept: dict[tuple[str, int, int], Stored] | None = None
"""By the file's name, and where in it the archive lies, while a load lasts."""


@contextmanager
def looks_kept() -> Iterator[None]:
    """Inside, what was found in an archive that was checked is not looked for again when it is read."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def look_into(archive: zipfile.ZipFile, part: io.IOBase, file: BinaryIO, offset: int, length: int) -> Stored | None:
    """The tensor that an archive holds; None where it is none of those that are understood here.

    Args:
        archive: Opened.
        part: What it was opened on.
        file: Where it lies, by its name.
        offset: Where in the file it begins.
        length: In bytes.
    """
    found = look_at_tensor(archive, part)
    if _kept is not None and found is not None:
        _kept[file.name, offset, length] = found
    return found


def look_at_tensor(archive: zipfile.ZipFile, part: io.IOBase) -> Stored | None:
    """The same, of one that nothing else is going to read."""
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    about = entries.get("data.pkl")
    if about is None or about.file_size > MAX_PICKLE or _content(entries.get("byteorder"), part) != sys.byteorder:
        return None
    try:
        (name, key, numel), offset, size, stride, *_ = _Description(io.BytesIO(_bytes(about, part))).load()
        stored = Stored(begin_of(entries[f"data/{key}"], part), torch.Size(size), tuple(stride), DTYPES[name])
        fits = entries[f"data/{key}"].file_size == numel * stored.dtype.itemsize == stored.nbytes
        return stored if fits and offset == 0 and len(stride) == len(size) and stored.has_no_gaps else None
    except Exception:  # a damaged pickle raises almost anything
        return None


class _Description(pickle.Unpickler):
    """Of a tensor: its storage, offset, size and stride; nothing is called but what is written here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _arguments
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, name, key, _, numel = pid
        return name, key, numel


def _arguments(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def _bytes(entry: zipfile.ZipInfo, part: io.IOBase) -> bytes:
    part.seek(begin_of(entry, part))
    content: bytes = part.read(entry.file_size)
    return content


def _content(entry: zipfile.ZipInfo | None, part: io.IOBase) -> str:
    return "" if entry is None or entry.file_size > MAX_PICKLE else _bytes(entry, part).decode("latin-1")


def read_rows(file: BinaryIO, offset: int, length: int, first_row: int, into: Tensor) -> bool:
    """Read rows of a stored tensor straight into memory; False where that is not possible, and nothing was done.

    Args:
        file: Opened without a buffer, or with one.
        offset: Where the archive begins in it.
        length: Of the archive.
        first_row: Of the stored tensor, along its first dim.
        into: As long as all that is wanted; or with the strides of the whole stored one, where those are others.

    Raises:
        EOFError: The file is shorter than it says.
    """
    if into.device.type != "cpu":
        return False
    stored = None if _kept is None else _kept.get((file.name, offset, length))
    if stored is None:
        with zipfile.ZipFile(part := Part(file, offset, length)) as archive:
            stored = look_at_tensor(archive, part)
    if stored is None or stored.dtype != into.dtype:
        return False
    row = into.shape[1:].numel() * into.dtype.itemsize
    are_rows = stored.is_in_order and into.is_contiguous() and _has_rows(stored.shape, into.shape, first_row)
    if not are_rows and (stored.shape, stored.stride) != (into.shape, into.stride()):
        return False
    file.seek(offset + stored.begin + first_row * row)
    memory = memoryview((ctypes.c_char * into.nbytes).from_address(into.data_ptr())).cast("B")
    at = 0
    while at < into.nbytes:
        if not (count := file.readinto(memory[at:])):  # type: ignore[attr-defined]  # binary files have it
            raise EOFError("the file is shorter than its index says")
        at += count
    torch.autograd.graph.increment_version(into)
    return True


def _has_rows(stored: torch.Size, wanted: torch.Size, first_row: int) -> bool:
    is_alike = len(stored) == len(wanted) and stored[1:] == wanted[1:]
    return is_alike and (not wanted or first_row + wanted[0] <= stored[0])
