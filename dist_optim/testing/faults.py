"""Faults of a disk, and kills, at a chosen file-system call: what a save leaves behind can be looked at for each.

Python announces its file-system calls to audit hooks (PEP 578). One hook counts those that change something below a
folder, and at the chosen one raises an error, or ends the process as SIGKILL does.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Calls", "disk_full", "faults_below", "kill", "read_only"]

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(slots=True)
class Calls:
    """File-system calls that change something below a folder."""

    below: str
    number: int | None
    """Of the call at which ``act`` runs, from 0; None for none."""
    act: Callable[[], None]
    count: int = 0
    """Calls so far."""

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """One call, whatever it is."""
        if self._concerns(event, arguments):
            self.count += 1
            if self.count - 1 == self.number:
                self.act()

    def _concerns(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            is_change = isinstance(flags, int) and bool(flags & _WRITES)
            return is_change and isinstance(path, (str, bytes, os.PathLike)) and self._is_below(path)
        if event not in _CHANGES:
            return False
        # Relative to an open folder, as rmtree goes: which one is not told.
        is_relative = any(isinstance(one, int) and one >= 3 for one in arguments[1:])
        return is_relative or any(self._is_below(one) for one in arguments if isinstance(one, (str, os.PathLike)))

    def _is_below(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.below)


_active: list[Calls] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for calls in _active:
        calls.note(event, arguments)


@contextmanager
def faults_below(folder: Path, number: int | None, act: Callable[[], None]) -> Iterator[Calls]:
    """Inside, ``act`` runs in the place of the chosen file-system call below a folder.

    Args:
        folder: What counts: paths that begin like it.
        number: Which call, from 0; None only counts.
        act: Raises what the call shall fail with, or does not return.
    """
    if not _installed:
        sys.addaudithook(_hook)  # for good: Python takes none back
        _installed.append(True)
    calls = Calls(str(folder.absolute()), number, act)
    _active.append(calls)
    try:
        yield calls
    finally:
        _active.remove(calls)


def kill() -> None:
    """End this process at once: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    """What a write says when nothing is left."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    """What a write says on a disk that has turned read-only."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
