"""What a rank's main thread is at: at a call that all ranks make together, waiting in a collective, or at work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePath
from types import FrameType

__all__ = ["Call", "Lookout", "Whereabouts", "standing_at"]

WAITING_IN = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/utils.py",
    "torch/distributed/fsdp/",
    "torch/distributed/tensor/",
    "torch/autograd/graph.py",  # backward, where DDP's reducer waits
    "torch/nn/parallel/distributed.py",
)
"""Files whose functions wait for other ranks. Those of checkpoints are none of them: they wait for a disk."""
LIBRARIES = ("site-packages/", "dist-packages/", "/dist_optim/", "torch/", "lib/python3")
IDLE_S = 3.0
"""A main thread that stands still in such a file, of a process that does nothing meanwhile, waits after this time."""
IDLE_SHARE = 0.1
"""Of a core: a process that takes less does nothing."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that ranks make together: which one, by what ranks, and the how manieth of theirs."""

    name: str
    ranks: tuple[int, ...]
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """What a rank says of itself, on the board."""

    call: Call | None = None
    """The call in which it waits for the others."""
    waits_in: str = ""
    """The collective of somebody else, in which it waits; empty while it works."""
    answers: int = 0
    """How many of the news it had read, and so which questions this answers."""

    def to_text(self) -> str:
        """For the board."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Whereabouts:
        """From the board."""
        found = json.loads(text)
        call = found["call"]
        return cls(
            call=call and Call(call["name"], tuple(call["ranks"]), call["number"]),
            waits_in=found["waits_in"],
            answers=found["answers"],
        )


_at: list[Call] = []


@contextmanager
def standing_at(call: Call) -> Iterator[None]:
    """While the block runs, this process's main thread waits for others in this call."""
    _at.append(call)
    try:
        yield
    finally:
        _at.pop()


class Lookout:
    """Looks at a thread from another one, every second or so, and says whether it waits."""

    def __init__(self, thread_id: int) -> None:
        self._thread_id = thread_id
        self._mark: tuple[int, int, int] = (0, 0, 0)
        self._since = (0.0, 0.0)  # wall time and processor time when the thread was last seen to move

    def look(self, num_read: int) -> Whereabouts:
        """Where the thread is now; that it waits is known ``IDLE_S`` after the first look."""
        call = next(iter(_at[-1:]), None)
        frame = sys._current_frames().get(self._thread_id)
        now = (time.monotonic(), time.process_time())
        # A thread that went from one collective to the next, past a disk say, can stand in a frame at the same address,
        # on the same line: its own processor time has moved.
        mark = (id(frame), frame.f_lasti if frame else 0, _thread_time_ns(self._thread_id) if frame else 0)
        elapsed = now[0] - self._since[0]
        if mark != self._mark or now[1] - self._since[1] > IDLE_SHARE * max(elapsed, 1.0):
            self._mark, self._since, elapsed = mark, now, 0.0
        waits_in = _place(frame) if call is None and elapsed >= IDLE_S and _is_in_collective(frame) else ""
        return Whereabouts(call=call, waits_in=waits_in, answers=num_read)


def _thread_time_ns(thread_id: int) -> int:
    """Processor time of a living thread; 0 where the system does not tell it."""
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    return 0 if clock_of is None else time.clock_gettime_ns(clock_of(thread_id))


def _is_in_collective(frame: FrameType | None) -> bool:
    """Whether one of the innermost functions, of torch, waits for other ranks."""
    for inner in _outwards(frame):
        file = PurePath(inner.f_code.co_filename).as_posix()
        if any(part in file for part in WAITING_IN):
            return True
        if "torch/" not in file:
            return False
    return False


def _place(frame: FrameType | None) -> str:
    """The innermost function of torch's that a user would know, and the line of the user's own program."""
    called = next((inner.f_code.co_name for inner in _outwards(frame)), "a collective")
    for inner in _outwards(frame):
        file = PurePath(inner.f_code.co_filename).as_posix()
        if not any(part in file for part in LIBRARIES):
            return f"{called} ({PurePath(file).name}, line {inner.f_lineno})"
    return called


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
