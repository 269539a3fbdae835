"""Folders that appear whole: written aside, then renamed.

A job killed at any moment leaves the folder that was there before, or the new one; never half of one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_optim.errors import CheckpointError, DistOptimError
from dist_optim.ranks.agreement import own_rank
from dist_optim.ranks.together import raise_together

__all__ = ["attempt", "opened", "read_json", "write_json", "written_aside"]


@contextmanager
def written_aside(directory: Path, process_group: dist.ProcessGroup | None) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``directory`` when the block ends. Collective.

    What the block raises, it raises on all ranks together; then ``directory`` stays as it was.

    Raises:
        CheckpointError: On all ranks: the folder cannot be made or renamed.
    """
    aside, is_first = _beside(directory, "partial"), own_rank(process_group) == 0
    attempt(lambda: _start(directory, aside) if is_first else None, directory, process_group)
    yield aside
    attempt(lambda: _replace(directory, aside) if is_first else None, directory, process_group)


def opened(directory: Path) -> Path:
    """The folder to read: the one that a replacement had put aside, when a kill came right in between."""
    replaced = _beside(directory, "replaced")
    return replaced if not directory.exists() and replaced.exists() else directory


def attempt(action: Callable[[], Any], directory: Path, process_group: dist.ProcessGroup | None) -> Any:
    """Run it on this rank, and raise on every rank when it failed on any. Collective."""
    error: DistOptimError | None = None
    result = None
    try:
        result = action()
    except DistOptimError as caught:
        error = caught
    except OSError as caught:
        error = CheckpointError(
            f"The checkpoint {str(directory)!r}: {type(caught).__name__}: {caught}. Choose a folder that can be "
            "written and has room, on a disk that all ranks share."
        )
    raise_together(error, process_group)
    return result


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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path.parent)!r} is not a checkpoint of dist_optim: it has no {path.name}. Give a folder that "
            "dist_optim saved."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {type(error).__name__}: {error}. Resume from another checkpoint."
        ) from error


def _start(directory: Path, aside: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"The checkpoint {str(directory)!r} is a file. Give the name of a folder.")
    replaced = _beside(directory, "replaced")
    if replaced.exists():
        if directory.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(directory)
    if aside.exists():
        shutil.rmtree(aside)  # left by a job that was killed
    aside.mkdir(parents=True)


def _replace(directory: Path, aside: Path) -> None:
    replaced = _beside(directory, "replaced")
    if directory.exists():
        directory.rename(replaced)
    aside.rename(directory)
    _sync(directory.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _beside(directory: Path, word: str) -> Path:
    return directory.with_name(f".{directory.name}.{word}")


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
