"""Damage of checkpoints, generated: bits, files, parts of others, wrong JSON, code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_optim.checkpoint.identity import DIGEST, digest_of, digest_of_record
from dist_optim.checkpoint.index import extents
from dist_optim.checkpoint.seals import _checksums

RECORDS = ("checkpoint.json", "optimizer/optimizer.json")
FORGED = " (all digests made anew)"


@dataclass(frozen=True)
class Damage:
    """Something that happened to a checkpoint."""

    what: str
    act: Callable[[Path], object]
    is_sealed: bool = False
    """Whoever did it computed all digests anew: a forgery, not an accident."""
    other: str = ""
    """The checkpoint that it may be all of, in fact."""

    def __str__(self) -> str:
        return f"{self.what}{FORGED if self.is_sealed else ''}"

    def of(self, whole: Path, damaged: Path) -> None:
        """A damaged copy."""
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        self.act(damaged)
        if self.is_sealed:
            reseal(damaged)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def reseal(folder: Path) -> None:
    """Compute all digests of a checkpoint anew, as far as that is possible."""
    for name, key, tensors in ((RECORDS[1], "tensors", "optimizer/tensors"), (RECORDS[0], "model", "model")):
        record = _read(folder / name)
        if not isinstance(record, dict):
            continue
        if isinstance(record.get(key), dict) and "index" in record[key]:
            record[key] = sealed_anew(folder / tensors, record[key])
        if isinstance(record.get("parts"), dict):
            present = [part for part in record["parts"] if (folder / part).is_file()]
            record["parts"] = {**record["parts"], **{part: digest_of(folder / part) for part in present}}
        plain = {inner: value for inner, value in record.items() if inner != DIGEST}
        (folder / name).write_text(json.dumps({**plain, DIGEST: digest_of_record(plain)}))


def sealed_anew(tensors: Path, before: dict[str, Any]) -> dict[str, Any]:
    try:
        files = _checksums(tensors, 0, 1)
    except Exception:
        files = before.get("files", {})
    content = (tensors / ".metadata").read_bytes() if (tensors / ".metadata").is_file() else b""
    return {**before, "index": hashlib.sha256(content).hexdigest(), "files": files}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def of_bytes(folder: Path) -> Iterator[Damage]:
    """One bit, zeros, truncation, more bytes."""
    chance = random.Random(0)
    for name in files_in(folder):
        size = (folder / name).stat().st_size
        for _ in range(14):
            at = chance.randrange(size * 8)
            yield Damage(f"bit {at} of {name}", partial(_flip, name, at))
        for at in (size // 2, chance.randrange(size)):
            yield Damage(f"zeros at {at} of {name}", partial(_write, name, at, bytes(min(64, size - at))))
        for percent in (0, 50, 98):
            yield Damage(f"{percent} % of {name}", partial(_truncate, name, size * percent // 100))
        yield Damage(f"100 bytes after {name}", partial(_write, name, size, b"x" * 100))


def of_tensors(folder: Path) -> Iterator[Damage]:
    """One bit of the numbers of each tensor."""
    chance = random.Random(2)
    for tensors in (folder / "model", folder / "optimizer" / "tensors"):
        for name, every in extents(tensors).items():
            content, path = (tensors / name).read_bytes(), (tensors / name).relative_to(folder)
            for extent in every:
                archive = zipfile.ZipFile(io.BytesIO(content[extent.offset :][: extent.length]))
                for entry in archive.infolist():
                    if "/data/" in entry.filename and entry.file_size:
                        header = content[extent.offset + entry.header_offset :][:30]
                        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
                        bit = (extent.offset + begin) * 8 + chance.randrange(entry.file_size * 8)
                        yield Damage(f"a number's bit {bit} of {path}", partial(_flip, str(path), bit))


def of_files(whole: Path) -> Iterator[Damage]:
    """Missing; a folder, a link or a pipe in its place; two exchanged."""
    files = files_in(whole)
    for name in files:
        yield Damage(f"no {name}", partial(_remove, name))
        yield Damage(f"a folder as {name}", partial(_put, name, os.mkdir))
        yield Damage(f"a pipe as {name}", partial(_put, name, os.mkfifo))
        for target in (name, "/dev/zero", "/etc/passwd"):
            yield Damage(f"a link to {target} as {name}", partial(_link, name, target))
    for folder in sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_dir()):
        yield Damage(f"no {folder}", partial(_remove, folder))
        yield Damage(f"nothing in {folder}", partial(_put, folder, os.mkdir))
    for at, one in enumerate(files):
        for other in files[at + 1 :]:
            yield Damage(f"{one} and {other} exchanged", partial(_exchange, one, other))


def of_one(rank: int) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What one rank alone reads."""
    name = f"ranks/{rank}.pt"
    yield from {
        "no": partial(_remove, name),
        "a pipe as": partial(_put, name, os.mkfifo),
        "a bit of": partial(_flip, name, 4000),
        "the other rank's as": partial(_exchange, "ranks/0.pt", "ranks/1.pt"),
    }.items()


def of_others(whole: Path, others: dict[str, Path]) -> Iterator[Damage]:
    """A part of another checkpoint; or all of it but one."""
    for label, other in others.items():
        for name in (*files_in(whole), "model", "optimizer", "optimizer/tensors", "ranks"):
            yield Damage(f"{name} of {label}", partial(_take, name, other), other=label)
            yield Damage(f"all but {name} of {label}", partial(_take_all_but, name, other), other=label)


NUMBERS: tuple[Any, ...] = (-7, 10**14, 1e30, float("nan"), float("inf"))
WRONG: tuple[Any, ...] = (*NUMBERS, None, True, "fast", "", [], {}, [2.0, 3.0], {"tuple": 3})


def of_records(folder: Path, num_sealed: int) -> Iterator[Damage]:
    """Valid JSON with wrong content: every entry dropped, renamed, of another type, out of range."""
    chance = random.Random(1)
    for name in RECORDS:
        record = json.loads((folder / name).read_text())
        changes: list[tuple[tuple[Any, ...], Any]] = []
        changes += [(path, change) for path in _paths(record) for change in ("drop", "rename", *WRONG)]
        changes += [((), None), ((), []), ((), {}), ((), 3), ((), "text")]
        for at, (path, change) in enumerate(chance.sample(changes, min(len(changes), num_sealed))):
            for is_sealed in (True, False) if at % 4 == 0 else (True,):
                act = partial(_edit, name, path, change)
                yield Damage(f"{name}: {'.'.join(map(str, path))} {change!r}", act, is_sealed)
    for text in ("[" * 100_000, '{"format": 2, "digest": ' + "1" * 5000 + "}", "\ufeff{}", "{" * 3):
        yield Damage(f"{text[:30]!r} as a record", partial(_replace, RECORDS[1], text.encode()))


def with_code(whole: Path, marker: Path) -> Iterator[Damage]:
    """Pickles that run something, in every file, in every form."""
    content: dict[str, bytes] = {"a pickle": pickle.dumps(Payload(marker))}
    for label, is_new in (("torch's file", True), ("torch's old file", False)):
        path = marker.with_name("made")
        torch.save(Payload(marker), path, _use_new_zipfile_serialization=is_new)
        content[label] = path.read_bytes()
    for name in files_in(whole):
        for label, made in content.items():
            yield Damage(f"{label} in {name}", partial(_replace, name, made), is_sealed=name not in RECORDS)


class Payload:
    """Runs as soon as it is unpickled by a plain unpickler."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _paths(item, (*path, key))


def _edit(name: str, path: tuple[Any, ...], change: Any, folder: Path) -> None:
    record = json.loads((folder / name).read_text())
    if not path:
        record = change
    else:
        parent = record
        for key in path[:-1]:
            parent = parent[key]
        if change == "drop":
            del parent[path[-1]]
        elif change == "rename" and isinstance(parent, dict):
            parent[f"{path[-1]}_"] = parent.pop(path[-1])
        elif change == "rename":
            parent.append(parent.pop(path[-1]))
        else:
            parent[path[-1]] = change
    (folder / name).write_text(json.dumps(record))


def _flip(name: str, bit: int, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(content)


def _write(name: str, at: int, content: bytes, folder: Path) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(at)
        file.write(content)


def _truncate(name: str, size: int, folder: Path) -> None:
    os.truncate(folder / name, size)


def _replace(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)


def _put(name: str, make: Callable[[Path], object], folder: Path) -> None:
    _remove(name, folder)
    make(folder / name)


def _remove(name: str, folder: Path) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _link(name: str, target: str, folder: Path) -> None:
    _remove(name, folder)
    (folder / name).symlink_to((folder / target) if target == name else Path(target))


def _exchange(one: str, other: str, folder: Path) -> None:
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)


def _take(name: str, other: Path, folder: Path) -> None:
    _remove(name, folder)
    (shutil.copytree if (other / name).is_dir() else shutil.copyfile)(other / name, folder / name)


def _take_all_but(name: str, other: Path, folder: Path) -> None:
    kept = folder.with_name("kept")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    shutil.copytree(other, folder)
    _take(name, kept, folder)
