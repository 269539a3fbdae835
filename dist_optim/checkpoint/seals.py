"""A folder of tensors, sealed when it is written and compared when it is read: nothing lost, changed or exchanged.

A *seal* is what a record says of the folder: the SHA-256 of its index, and of every file a checksum of each tensor's
archive, as eight digits, in the order in which they lie there. It is the CRC-32 of all of the archive but the contents
of its entries, whose own CRC-32 torch has put into the archive's directory: making the seal reads no tensor.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.checkpoint.archive import Part, Stored, begin_of, look_into, part_of
from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.identity import digest_of
from dist_optim.checkpoint.index import INDEX, Extent, extents
from dist_optim.errors import CheckpointError
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank

__all__ = ["check_files", "seal"]

DIGITS = 8
PIECE = 1 << 20
"""Bytes that are read at once."""
MAX_THREADS = 4
"""Of a rank: reading, and a checksum of a large piece, hold no lock of the interpreter's."""


def seal(directory: Path, ranks: dist.ProcessGroup | None) -> dict[str, Any]:
    """The seal of a folder that has just been written. Collective; each rank looks at one file, most likely its own."""
    own = attempt(lambda: _checksums(directory, own_rank(ranks), num_ranks(ranks)), directory, ranks)
    index = attempt(lambda: digest_of(directory / INDEX), directory, ranks)
    return {"index": index, "files": {name: text for one in gather_objects(own, ranks) for name, text in one.items()}}


def check_files(directory: Path, rank: int, num_ranks: int, sealed: dict[str, Any] | None = None) -> None:
    """Prove that the files hold every tensor that the index names, whole; and that all of it is what was sealed.

    Not a collective: ranks share the work. Every rank looks for all files, and reads its share of the tensors.

    Args:
        directory: The folder.
        rank: Which share to read.
        num_ranks: Of how many.
        sealed: Its seal; None where others have written it.

    Raises:
        CheckpointError: With the file that is missing, damaged, or of another checkpoint.
    """
    if sealed is not None and digest_of(directory / INDEX) != sealed["index"]:
        raise CheckpointError(
            f"The index of {str(directory)!r} is not the one that was saved with its record: it is damaged, or of "
            "another checkpoint. Resume from a folder that holds one save, whole."
        )
    by_file = extents(directory)
    _check_sizes(directory, by_file)
    if sealed is not None and {name: len(text) for name, text in sealed["files"].items()} != {
        name: DIGITS * len(every) for name, every in by_file.items()
    }:
        raise CheckpointError(f"{str(directory)!r} is damaged: its seal is of other files. Resume from another one.")
    expected = [
        (directory / name, extent, None if sealed is None else sealed["files"][name][DIGITS * at : DIGITS * (at + 1)])
        for name, every in by_file.items()
        for at, extent in enumerate(every)
    ]
    mine, num_threads = expected[rank::num_ranks], min(MAX_THREADS, os.cpu_count() or 1)

    def check(share: int) -> None:
        room = memoryview(bytearray(PIECE))  # one for all: memory that is new costs as much as the reading
        for one in mine[share::num_threads]:
            _check_tensor(*one, room)

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(check, range(num_threads)):
            pass  # what one raised is raised here


def _check_sizes(directory: Path, by_file: dict[str, list[Extent]]) -> None:
    for name, every in by_file.items():
        path, end = directory / name, max(one.offset + one.length for one in every)
        if not path.is_file() or path.stat().st_size < end:
            raise CheckpointError(
                f"{str(path)!r} is missing or damaged: the index of {str(directory)!r} names {end} bytes of it. Resume "
                "from another checkpoint."
            )


def _check_tensor(path: Path, extent: Extent, checksum: str | None, room: memoryview) -> None:
    try:
        with (
            path.open("rb", buffering=0) as file,
            zipfile.ZipFile(part := part_of(file, extent.offset, extent.length)) as archive,
        ):
            is_sealed = checksum is not None
            bad = "its checksum is another one" if is_sealed and _checksum(archive, part, extent) != checksum else ""
            bad = bad or _bad_entry(archive, part, extent, is_sealed, room) or _misfit(archive, part, file, extent)
    except Exception as error:  # a damaged archive raises almost anything
        bad = f"{type(error).__name__}: {error}"
    if bad:
        raise CheckpointError(
            f"{str(path)!r} is damaged: the tensor at byte {extent.offset} is not what was saved ({bad}). Resume from "
            "another checkpoint."
        )


def _bad_entry(archive: zipfile.ZipFile, part: Any, extent: Extent, is_sealed: bool, room: memoryview) -> str:
    """As ``ZipFile.testzip``, which reads by small pieces: torch compresses nothing, and large ones will do."""
    for entry in archive.infolist():
        if not is_sealed:
            archive.open(entry).close()  # looks at what precedes it, which a seal covers
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            return entry.filename
        begin, checksum = begin_of(entry, part), 0
        if begin + entry.file_size > extent.length:
            return entry.filename
        part.seek(begin)
        for at in range(0, entry.file_size, PIECE):
            count = part.readinto(room[: entry.file_size - at])
            checksum = zlib.crc32(room[:count], checksum)
        if checksum != entry.CRC:
            return entry.filename
    return ""


def _misfit(archive: zipfile.ZipFile, part: io.IOBase, file: BinaryIO, extent: Extent) -> str:
    """What the archive holds, where that is not what the index says; no content is read."""
    found: Any = look_into(archive, part, file, extent.offset, extent.length)
    if found is None:  # torch knows more kinds, and takes ten times as long
        part.seek(0)
        with torch.serialization.skip_data():
            found = torch.load(part, weights_only=True, map_location="cpu")  # type: ignore[arg-type]
    is_it = isinstance(found, (Stored, Tensor)) and (found.shape, found.dtype) == (extent.shape, extent.dtype)
    return "" if is_it else f"no {extent.dtype} of shape {tuple(extent.shape)}"


def _checksums(directory: Path, rank: int, num_ranks: int) -> dict[str, str]:
    """Of the files that are this rank's share, each with its checksums in one text."""
    by_file = extents(directory)
    mine = sorted(by_file, key=lambda name: (len(name), name))[rank::num_ranks]  # in the order of the ranks
    return {name: _checksums_of(directory / name, by_file[name]) for name in mine}


def _checksums_of(path: Path, every: Sequence[Extent]) -> str:
    texts = []
    with path.open("rb") as file:
        for extent in every:
            with zipfile.ZipFile(part := Part(file, extent.offset, extent.length)) as archive:
                texts.append(_checksum(archive, part, extent))
    return "".join(texts)


def _checksum(archive: zipfile.ZipFile, part: io.IOBase, extent: Extent) -> str:
    at, checksum = 0, 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        begin = begin_of(entry, part)
        checksum = zlib.crc32(_between(part, at, begin), checksum)
        at = begin + entry.compress_size
    return f"{zlib.crc32(_between(part, at, extent.length), checksum):0{DIGITS}x}"


def _between(part: io.IOBase, begin: int, end: int) -> bytes:
    part.seek(begin)
    content: bytes = part.read(max(0, end - begin))
    return content
