"""Faults of a disk, and kills, at a chosen file-system call: what a save leaves behind can be looked at for each.

Python announces its file-system calls to audit hooks (PEP 578). One hook counts those that change something below a
folder, and at the chosen one raises an error, or ends the process as SIGKILL does. What Python does not announce is
announced here: ``fsync``, and the files that torch writes in C++ and safetensors in Rust, when they begin and when they
end. A fault at such an end leaves half of the file.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch.serialization import _open_zipfile_writer_file

__all__ = ["Calls", "disk_full", "faults_below", "kill", "read_only"]

_SYNCED, _WRITTEN = "dist_optim.synced", "dist_optim.written"
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", _SYNCED, _WRITTEN}
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
        if not self._concerns(event, arguments):
            return
        self.count += 1
        if self.count - 1 == self.number:
            if event == _WRITTEN:
                os.truncate(arguments[0], os.stat(arguments[0]).st_size // 2)
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
    with _all_announced():
        _active.append(calls)
        try:
            yield calls
        finally:
            _active.remove(calls)


@contextmanager
def _all_announced() -> Iterator[None]:
    """What Python itself says nothing of."""
    torchs = _open_zipfile_writer_file
    begin, end = torchs.__init__, torchs.__exit__

    def begin_file(self: Any, name: str, *args: Any) -> None:
        sys.audit("open", name, "wb", _WRITES)
        begin(self, name, *args)

    def end_file(self: Any, *args: Any) -> None:
        end(self, *args)
        sys.audit(_WRITTEN, self.name)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("os.fsync", _announcing_fsync(os.fsync)))
        stack.enter_context(mock.patch.object(torchs, "__init__", begin_file))
        stack.enter_context(mock.patch.object(torchs, "__exit__", end_file))
        if importlib.util.find_spec("safetensors") is not None:
            import safetensors.torch

            write = _announcing_write(safetensors.torch.serialize_file)
            stack.enter_context(mock.patch("safetensors.torch.serialize_file", write))
        yield


def _announcing_fsync(original: Callable[[int], None]) -> Callable[[int], None]:
    def fsync(handle: int) -> None:
        sys.audit(_SYNCED, os.readlink(f"/proc/self/fd/{handle}"))
        original(handle)

    return fsync


def _announcing_write(original: Callable[..., None]) -> Callable[..., None]:
    def serialize_file(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        sys.audit("open", filename, "wb", _WRITES)
        original(tensors, filename, *args, **options)
        sys.audit(_WRITTEN, filename)

    return serialize_file


def kill() -> None:
    """End this process at once: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    """What a write says when nothing is left."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    """What a write says on a disk that has turned read-only."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
