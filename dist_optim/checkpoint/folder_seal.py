"""A folder that several hands have written, bound into one save: the Trainer's checkpoints, and accelerate's states.

The optimizer's part is bound by its own record (``identity``). Weights, schedule, progress and generators beside it are
transformers' and accelerate's files, which say nothing of where they are from. So when all is written, all that a load
would read is sealed in one more record::

    dist_optim_save.json    when it was saved; of every part, the size and the checksums of each file

It is written last: a folder without it was not saved to its end. Checksums are CRC-32, of 64 MiB each, and ranks share
them, in saving as in loading.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.identity import FORMAT, read_record, write_record
from dist_optim.checkpoint.schema import FOLDER, OPTIMIZER
from dist_optim.checkpoint.seals import check_files
from dist_optim.errors import CheckpointError
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank

__all__ = [
    "MARK",
    "PARTS",
    "check_folder",
    "differences_in",
    "parts_among",
    "seal_again",
    "seal_alone",
    "seal_folder",
]

MARK = "dist_optim_save.json"

RECORDS = ("optimizer/optimizer.json", "dist_optim/optimizer.json", "dist_optim_[0-9]*/optimizer.json")
"""Of our optimizers, by the Trainer and by accelerate."""

PARTS: dict[str, tuple[str, ...]] = {
    "model": (
        "model*.safetensors*",
        "pytorch_model*",
        "adapter_model*",
        "*/adapter_model*",
        "dist_optim_weights/*",
    ),
    "optimizer": (
        *RECORDS,
        "optimizer*.pt",
        "optimizer*.bin",
        "optimizer_[0-9]*/*",
        "global_step*/*",
        "latest",
    ),
    "scheduler": ("scheduler*.pt", "scheduler*.bin"),
    "trainer_state": ("trainer_state.json",),
    "rng_state": ("rng_state*.pth", "random_states_*.pkl"),
    "scaler": ("scaler.pt",),
    "data": ("sampler*.bin", "dl_state_dict*.bin"),
    "objects": ("custom_checkpoint_*.pkl",),
}
"""What a load reads, by the names under which ``allow_changed`` lets it be of another save; "*" is also of folders."""

DIGITS, PIECE, CHUNK = 8, 1 << 26, 1 << 22
"""Of a checksum; bytes that it is of; bytes that are read at once."""


def seal_folder(directory: Path, ranks: dist.ProcessGroup | None = None) -> None:
    """Write the record of a folder in which all ranks have written what they had. Collective.

    Raises:
        CheckpointError: On all ranks; the folder has no record.
    """
    is_first = own_rank(ranks) == 0
    own = attempt(lambda: _sizes(directory) if is_first else {}, directory, ranks)
    sizes = gather_objects(own, ranks)[0]
    sums = attempt(lambda: _sums(directory, sizes, own_rank(ranks), num_ranks(ranks)), directory, ranks)
    every = {at: one for share in gather_objects(sums, ranks) for at, one in share.items()}
    attempt(lambda: _write(directory, sizes, every) if is_first else None, directory, ranks)


def seal_alone(directory: Path) -> None:
    """The same by one process. Not a collective."""
    sizes = _sizes(directory)
    _write(directory, sizes, _sums(directory, sizes, 0, 1))


def seal_again(directory: Path) -> None:
    """Let the record know files that were added, taken away or grown since, by who may. By one process."""
    sealed = read_record(directory / MARK, FOLDER)["parts"]
    known = {(part, name): one["bytes"] for part, files in sealed.items() for name, one in files.items()}
    if _sizes(directory) != known:
        seal_alone(directory)


def check_folder(
    directory: Path,
    ranks: dist.ProcessGroup | None = None,
    *,
    allowed: Iterable[str] = (),
    only: Collection[str] = tuple(PARTS),
    and_tensors: bool = False,
) -> None:
    """Refuse a folder whose files are not all of one save. Collective; ranks share the reading; nothing is changed.

    One with neither this record nor an optimizer of ours is of somebody else, and left to who reads it.

    Args:
        directory: The folder.
        ranks: Who loads it.
        allowed: Parts that may be of another save: names of ``PARTS``.
        only: What is going to be read.
        and_tensors: Whether to check the tensors of our optimizers too: where they are loaded after the weights.

    Raises:
        CheckpointError: On all ranks: with what is missing, was added or is another one.
    """
    asked = [part for part in only if part not in set(allowed)]

    def look() -> list[tuple[str, str]]:
        return list(differences_in(directory, own_rank(ranks), num_ranks(ranks), asked))

    found = gather_objects(attempt(look, directory, ranks, is_reading=True), ranks)
    if different := list(dict.fromkeys(one for share in found for one in share)):
        parts = sorted({*(part for part, _ in different), *allowed})
        more = f" ({len(different)} files differ)" if len(different) > 1 else ""
        raise CheckpointError(
            f"{str(directory)!r} is not one save, whole: {different[0][1]}{more}. Nothing was changed. Resume "
            f"from another folder; or, where you have put it there yourself, load with "
            f"allow_changed={parts!r} (launch/train.py: --allow_changed {','.join(parts)})."
        )
    if and_tensors:
        attempt(lambda: _check_tensors(directory, own_rank(ranks), num_ranks(ranks)), directory, ranks, is_reading=True)


def _check_tensors(directory: Path, rank: int, num_ranks: int) -> None:
    for path in (path for each in RECORDS for path in directory.glob(each)):
        check_files(path.parent / "tensors", rank, num_ranks, read_record(path, OPTIMIZER)["tensors"])


def differences_in(
    directory: Path, rank: int = 0, num_ranks: int = 1, parts: Collection[str] = tuple(PARTS)
) -> Iterator[tuple[str, str]]:
    """What is no longer as the record says: the part, and what is wrong. Not a collective.

    Args:
        directory: The folder.
        rank: Which share of the checksums to compute.
        num_ranks: Of how many.
        parts: What to look at.

    Raises:
        CheckpointError: The record is damaged, or a file cannot be read.
    """
    has_record, ours = (directory / MARK).exists(), [path for each in RECORDS for path in directory.glob(each)]
    if not has_record and not ours:
        return
    sealed = read_record(directory / MARK, FOLDER)["parts"] if has_record else {}
    expected = {(part, name): one for part in parts for name, one in sealed.get(part, {}).items()}
    there = {(part, name): size for (part, name), size in _sizes(directory).items() if part in parts}
    for part, name in sorted(expected.keys() | there.keys()):
        if (part, name) not in there:
            yield part, f"{name!r} ({part}) is missing"
        elif not has_record:
            reason = f"without {MARK}, which each save ends with, nothing says of which save it is"
            yield part, f"{name!r} ({part}) is not known: {reason}"
        elif (part, name) not in expected:
            yield part, f"{name!r} ({part}) was not there when it was saved"
        elif there[part, name] != expected[part, name]["bytes"]:
            yield part, f"{name!r} ({part}) is another file: it has {there[part, name]} bytes"
    same = {key: size for key, size in there.items() if key in expected and size == expected[key]["bytes"]}
    for (part, name, at), one in _sums(directory, same, rank, num_ranks).items():
        if expected[part, name]["sums"][DIGITS * at : DIGITS * (at + 1)] != one:
            yield part, f"{name!r} ({part}) is another file, or damaged: its checksum differs"


def parts_among(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the names in ``allow_changed``, those of parts of a folder, and all others: hyperparameters."""
    every = list(names)
    return [name for name in every if name in PARTS], [name for name in every if name not in PARTS]


def _sizes(directory: Path) -> dict[tuple[str, str], int]:
    """Of every file that a load reads, by its part and its name in the folder."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    names = {str(path.relative_to(directory).as_posix()): path for path in files}
    return {
        (part, name): path.stat().st_size
        for name, path in sorted(names.items())
        for part, patterns in PARTS.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _sums(
    directory: Path, sizes: Mapping[tuple[str, str], int], rank: int, num_ranks: int
) -> dict[tuple[str, str, int], str]:
    """This rank's share of the checksums."""
    pieces = [(part, name, at) for (part, name), size in sorted(sizes.items()) for at in range(-(-size // PIECE))]
    return {(part, name, at): _sum(directory / name, at) for part, name, at in pieces[rank::num_ranks]}


def _sum(path: Path, at: int) -> str:
    checksum = 0
    with path.open("rb") as file:
        file.seek(at * PIECE)
        for _ in range(PIECE // CHUNK):
            checksum = zlib.crc32(file.read(CHUNK), checksum)
    return f"{checksum:0{DIGITS}x}"


def _write(directory: Path, sizes: Mapping[tuple[str, str], int], sums: Mapping[tuple[str, str, int], str]) -> None:
    parts: dict[str, dict[str, Any]] = {}
    for (part, name), size in sizes.items():
        own = [sums[part, name, at] for at in range(-(-size // PIECE))]
        parts.setdefault(part, {})[name] = {"bytes": size, "sums": "".join(own)}
    write_record(directory / MARK, {"format": FORMAT, "saved_at_ns": time.time_ns(), "parts": parts})
