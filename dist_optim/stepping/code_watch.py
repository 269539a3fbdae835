"""No proof is complete, so code that it did not reach is watched: a step that is about to run it raises.

From Python 3.12 on by ``sys.monitoring``: an event for each line until it has been seen, and none from then on. Below,
by ``sys.settrace`` while a step runs, with events for lines in functions alone that hold an unproven one. Measured on
Python 3.11 with 20 matrices of 64 x 64: 0.1 to 0.4 ms a step of Lion, ADOPT and StableAdamW (0.15 to 0.85 ms), 2 ms of
SOAP (4 ms); with matrices of 512 x 512 less than steps differ among themselves. On 3.12 nothing.

Seen are lines. A branch within one line, and what torch does below, are not.
"""

from __future__ import annotations

import linecache
import sys
import threading
import weakref
from collections.abc import Mapping
from types import CodeType, FrameType, TracebackType
from typing import Any

from dist_optim.errors import UnprovenCodeError
from dist_optim.specs.verdict import Verdict
from dist_optim.stepping.own_code import OwnCode

__all__ = ["CodeWatch"]


class CodeWatch:
    """A context for every real step of a class that was proven: whoever enters unproven code raises.

    It costs nothing where a proof left no line out. It may be entered again and again, by one thread at a time.

    Args:
        verdict: Whose ``unreached`` lines are watched.

    Raises:
        UnprovenCodeError: From within the step, before the line runs; or at the end, where the class caught it.
    """

    def __init__(self, verdict: Verdict) -> None:
        self._name = verdict.name
        self._unreached: Mapping[str, frozenset[int]] = {
            place: frozenset(lines) for place, lines in verdict.unreached.items()
        }
        self._own = OwnCode(self._unreached)
        self._error: UnprovenCodeError | None = None
        self._backend: _Monitored | _Traced | None = None
        if self._unreached:
            self._backend = _Monitored(self) if sys.version_info >= (3, 12) and _Monitored.tool() else _Traced(self)

    def __enter__(self) -> CodeWatch:
        self._error = None
        if self._backend is not None:
            self._backend.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._backend is not None:
            self._backend.stop()
        if self._error is not None and error is None:
            raise self._error

    def lines_in(self, code: CodeType) -> frozenset[int] | None:
        """Unproven lines of the file of this code; None where nothing of it is."""
        lines = self._unreached.get(code.co_filename)
        if lines is None:  # a file of the package that no proof has entered: all of it
            return frozenset([code.co_firstlineno]) if self._own.has(code.co_filename) else None
        return lines if lines and not lines.isdisjoint(_lines(code)) else None

    def refuse(self, code: CodeType, line: int) -> None:
        """Raise for a line that is about to run; the first, where the class has caught that and goes on."""
        if self._error is not None:
            raise self._error
        text = linecache.getline(code.co_filename, line).strip()
        self._error = UnprovenCodeError(
            f"{self._name}: this step is about to run a line that was never executed when its tensors were proven "
            f"independent: {code.co_filename}:{line}, in {code.co_name}: {text!r}. Whether they still are is not "
            "known. Go on from the last checkpoint with independent=False in "
            "the arguments of the optimizer: one rank then steps all tensors, exact and not sharded; or with "
            "independent=True, if you know that this line does not let one tensor depend on another."
        )
        raise self._error


def _lines(code: CodeType) -> set[int]:
    return {line for _, _, line in code.co_lines() if line} | {code.co_firstlineno}


class _Traced:
    """By ``sys.settrace``; whoever traces already (a debugger, a measure of coverage) goes on to."""

    def __init__(self, watch: CodeWatch) -> None:
        self._watch = watch
        self._known: dict[CodeType, frozenset[int] | None] = {}
        self._before: Any = None

    def start(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def stop(self) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._known:
            self._known[code] = self._watch.lines_in(code)
        lines = self._known[code]
        theirs = None if self._before is None else self._before(frame, event, argument)
        if lines is None:
            return theirs
        if code.co_firstlineno in lines:
            self._watch.refuse(code, code.co_firstlineno)
        return _Local(self._watch, lines, theirs)


class _Local:
    """Events of one call of a function with unproven lines."""

    __slots__ = ("_lines", "_theirs", "_watch")

    def __init__(self, watch: CodeWatch, lines: frozenset[int], theirs: Any) -> None:
        self._watch, self._lines, self._theirs = watch, lines, theirs

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_lineno in self._lines:
            self._watch.refuse(frame.f_code, frame.f_lineno)
        if self._theirs is not None:
            self._theirs = self._theirs(frame, event, argument)
        return self


class _Monitored:
    """By ``sys.monitoring``: one tool for all watches, whose events are switched off place by place once seen."""

    _tool: int | None = None
    _active = threading.local()
    _watches: weakref.WeakSet[CodeWatch] = weakref.WeakSet()

    def __init__(self, watch: CodeWatch) -> None:
        self._watch = watch
        self._watches.add(watch)
        _monitoring().restart_events()  # places that others have seen may be unproven for this one

    @classmethod
    def tool(cls) -> bool:
        """Take a tool's number, once; False where none is free."""
        if cls._tool is None:
            monitoring = _monitoring()
            free = [number for number in (4, 3, 1, 0, 2) if monitoring.get_tool(number) is None]
            if not free:
                return False
            cls._tool = free[0]
            monitoring.use_tool_id(cls._tool, "dist_optim")
            events = monitoring.events
            monitoring.register_callback(cls._tool, events.PY_START, cls._started)
            monitoring.register_callback(cls._tool, events.LINE, cls._line)
            monitoring.set_events(cls._tool, events.PY_START)
        return True

    def start(self) -> None:
        self._active.watch = self._watch

    def stop(self) -> None:
        self._active.watch = None

    @classmethod
    def _started(cls, code: CodeType, offset: int) -> Any:
        monitoring = _monitoring()
        if all(watch.lines_in(code) is None for watch in cls._watches):
            return monitoring.DISABLE
        watch = getattr(cls._active, "watch", None)
        if watch is None:
            return None
        monitoring.set_local_events(cls._tool, code, monitoring.events.LINE)
        if code.co_firstlineno in (watch.lines_in(code) or ()):
            watch.refuse(code, code.co_firstlineno)
        is_called = all(code.co_firstlineno not in (one.lines_in(code) or ()) for one in cls._watches)
        return monitoring.DISABLE if is_called else None

    @classmethod
    def _line(cls, code: CodeType, line: int) -> Any:
        if all(line not in (watch.lines_in(code) or ()) for watch in cls._watches):
            return _monitoring().DISABLE
        watch = getattr(cls._active, "watch", None)
        if watch is not None and line in (watch.lines_in(code) or ()):
            watch.refuse(code, line)
        return None


def _monitoring() -> Any:
    return sys.monitoring  # type: ignore[attr-defined, unused-ignore]
