"""Folders that appear whole: written aside, then renamed.

A job killed at any moment leaves the folder that was there before, or the new one; never half of one. Beside ``NAME``
there are, for a while::

    .NAME.partial/NAME    what is being written
    .NAME.replaced        what was there before, between two renames: ``opened`` and the next save find it
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from dist_optim.errors import CheckpointError, DistOptimError
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.ranks.together import together

__all__ = [
    "attempt",
    "begin_aside",
    "contents",
    "ended_aside",
    "filled_aside",
    "opened",
    "read_json",
    "recover",
    "removed_in_failure",
    "write_json",
    "written_aside",
]

Result = TypeVar("Result")

SHARED_DISK = "Choose a folder that can be written and has room, on a disk that all ranks share."


@contextmanager
def written_aside(directory: Path, process_group: dist.ProcessGroup | None) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``directory`` when the block ends. Collective.

    The folder given is called as ``directory`` is, in a folder of its own. What the block raises on any rank, all ranks
    raise at its end; ``directory`` then stays as it was, and nothing is left beside it. A rank that leaves the block
    early must not be awaited inside it: what fails there on one rank alone is to come after the last collective, or
    goes through ``attempt``.

    Raises:
        CheckpointError: On all ranks: the folder cannot be made, written or renamed, or not all ranks see it.
    """
    begin_aside(directory, process_group)
    with ended_aside(directory, process_group) as aside:
        yield aside


def begin_aside(directory: Path, process_group: dist.ProcessGroup | None) -> None:
    """Make the folder aside, which ``filled_aside`` and at last ``ended_aside`` write into. Collective.

    Raises:
        CheckpointError: On all ranks: it cannot be made, or not all ranks see it; nothing is left of it.
    """
    aside = _aside(directory)
    with removed_in_failure(aside.parent, own_rank(process_group) == 0):
        own = attempt(
            lambda: _start(directory, aside) if own_rank(process_group) == 0 else "", directory, process_group
        )
        word = gather_objects(own, process_group)[0]
        attempt(lambda: _assert_seen(aside, word), directory, process_group)


@contextmanager
def filled_aside(directory: Path, process_group: dist.ProcessGroup | None) -> Iterator[Path]:
    """As ``written_aside``, of a folder that ``begin_aside`` has made, and stays aside. Collective."""
    aside, failure = _aside(directory), None
    with removed_in_failure(aside.parent, own_rank(process_group) == 0):
        try:
            yield aside
        except Exception as caught:
            failure = caught
        attempt(lambda: _raise(failure), directory, process_group)


@contextmanager
def ended_aside(directory: Path, process_group: dist.ProcessGroup | None) -> Iterator[Path]:
    """As ``written_aside``, into the folder that ``begin_aside`` has made, maybe over another group. Collective."""
    with removed_in_failure(_aside(directory).parent, own_rank(process_group) == 0):
        with filled_aside(directory, process_group) as aside:
            yield aside
        attempt(lambda: _replace(directory, aside) if own_rank(process_group) == 0 else None, directory, process_group)


@contextmanager
def removed_in_failure(folder: Path, is_mine: bool) -> Iterator[None]:
    """Where the block fails together, so that all ranks have stopped writing, remove the folder, on one of them."""
    try:
        yield
    except DistOptimError:
        if is_mine:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def attempt(
    action: Callable[[], Result], directory: Path, process_group: dist.ProcessGroup | None, *, is_reading: bool = False
) -> Result:
    """Run it on this rank, and raise on every rank when it failed on any: a ``CheckpointError``, unless it is ours.

    Collective.
    """
    return together(
        action,
        process_group,
        doing=f"{'Reading' if is_reading else 'Writing'} the checkpoint {str(directory)!r}",
        remedy="Resume from another checkpoint." if is_reading else SHARED_DISK,
        otherwise=CheckpointError,
    )


def opened(directory: Path) -> Path:
    """The folder to read: the one that a replacement had put aside, when a kill came right in between."""
    replaced = _beside(directory, "replaced")
    return replaced if not directory.exists() and replaced.exists() else directory


def recover(parent: Path, names: str) -> None:
    """End what a killed job has begun in ``parent`` with folders of such names (a glob). One process calls it.

    What was put aside gets its name back, and what was written in part goes.
    """
    for replaced in parent.glob(f".{names}.replaced"):
        directory = parent / replaced.name.removeprefix(".").removesuffix(".replaced")
        if directory.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(directory)
    for partial in parent.glob(f".{names}.partial"):
        shutil.rmtree(partial)


def write_json(path: Path, content: Any) -> None:
    """Write it, and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read it.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        path.lstat()
        return json.loads(contents(path).decode())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path.parent)!r} is not a checkpoint of dist_optim: it has no {path.name}. Give a folder that "
            "dist_optim saved; DeepSpeed's own load through its engine alone."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {type(error).__name__}: {error}. Resume from another checkpoint."
        ) from error


def contents(path: Path) -> bytes:
    """The bytes of a file that is one: a pipe in its place would never end.

    Raises:
        CheckpointError: It is missing, or cannot be read.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        reason = "it is no file"
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{str(path)!r} cannot be read: {reason}. Resume from another checkpoint.")


def _start(directory: Path, aside: Path) -> str:
    """Make the folder aside; returns the word that lies beside it."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"The checkpoint {str(directory)!r} is a file. Give the name of a folder.")
    replaced = _beside(directory, "replaced")
    if replaced.exists():
        if directory.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(directory)
    if aside.parent.exists():
        shutil.rmtree(aside.parent)  # left by a job that was killed
    aside.mkdir(parents=True)
    word = uuid.uuid4().hex
    _word_beside(aside).write_text(word, encoding="utf-8")
    return word


def _assert_seen(aside: Path, word: str) -> None:
    """Ranks on nodes with disks of their own would each write a part, and nobody a checkpoint."""
    path = _word_beside(aside)
    if not path.exists() or path.read_text(encoding="utf-8") != word:
        raise CheckpointError(
            f"{str(aside)!r} on this rank is not the folder that the first rank has made: the ranks do not share this "
            "disk. Choose a folder on one that they share."
        )


def _aside(directory: Path) -> Path:
    return _beside(directory, "partial") / directory.name


def _word_beside(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.word")


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _replace(directory: Path, aside: Path) -> None:
    for path in [*aside.rglob("*"), aside]:
        _sync(path)
    replaced = _beside(directory, "replaced")
    if directory.exists():
        directory.rename(replaced)
    try:
        aside.rename(directory)
        _sync(directory.parent)
    except OSError:
        if not aside.exists():
            directory.rename(aside)
        if replaced.exists():
            replaced.rename(directory)
        raise
    for done_with in (aside.parent, replaced):  # it is saved: what cannot be removed now, the next save removes
        shutil.rmtree(done_with, ignore_errors=True)


def _beside(directory: Path, word: str) -> Path:
    return directory.with_name(f".{directory.name}.{word}")


def _sync(path: Path) -> None:
    """Wait until the disk has the file, or the folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
