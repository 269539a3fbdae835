"""The lines of a class's own code that the runs of a proof have executed, and those that are left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch.optim import Optimizer

from dist_optim.stepping.own_code import OwnCode, lines_of

__all__ = ["Reached"]


class Reached:
    """A record of lines.

    Args:
        optimizer_class: Whose own code is recorded.
    """

    def __init__(self, optimizer_class: type[Optimizer]) -> None:
        self._own = OwnCode.of(optimizer_class)
        self._is_own: dict[CodeType, bool] = {}
        self._lines: dict[str, set[int]] = {}
        self._before: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In here, what runs is recorded. Whoever traces already goes on to."""
        if not self._own.files and not self._own.folders:
            yield
            return
        self._before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        theirs = None if self._before is None else self._before(frame, event, argument)
        if code not in self._is_own:
            self._is_own[code] = self._own.has(code.co_filename)
        if not self._is_own[code]:
            return theirs
        lines = self._lines.setdefault(code.co_filename, set())
        lines |= {code.co_firstlineno, frame.f_lineno}

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal theirs
            lines.add(frame.f_lineno)
            if theirs is not None:
                theirs = theirs(frame, event, argument)
            return local

        return local

    def unreached(self) -> dict[str, tuple[int, ...]]:
        """Lines that were not executed, by file; a folder stands for all files below it that are not listed."""
        files = self._own.files | self._lines.keys()
        found = {name: tuple(sorted(lines_of(name) - self._lines.get(name, set()))) for name in sorted(files)}
        return {**found, **{folder: () for folder in self._own.folders}}
