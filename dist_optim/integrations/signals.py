"""How a rank of a script ends when it is told to: SIGINT (Ctrl-C) or SIGTERM. Imports nothing heavy."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

__all__ = ["SignalWatch", "end_quietly_on_interrupt", "ignore_signals", "interrupt_as_usual", "is_rank_0"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_S = 1.0


class SignalWatch:
    """From its construction on, a signal ends this process with exit code 128 + its number.

    A thread of its own does that, whatever the main thread is in: an exception out of a signal handler would wait for a
    collective or a connection attempt to return, and can be lost in an import or a callback. It calls no collective,
    because the other ranks may already be gone. A rank whose torchrun agent has died ends as after SIGTERM.
    """

    def __init__(self) -> None:
        self._clean_up: Callable[[], None] = lambda: None
        self._step: Callable[[], int] = lambda: 0
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._arrived, arrival = os.pipe()
        os.set_blocking(arrival, False)
        signal.set_wakeup_fd(arrival, warn_on_full_buffer=False)  # the signal's number arrives here as a byte
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._wait, name="signal-watch", daemon=True).start()

    def follow(self, clean_up: Callable[[], None] = lambda: None, step: Callable[[], int] = lambda: 0) -> None:
        """Say what to do first when a signal comes, and how far training has then come; nothing and 0 by default."""
        self._clean_up, self._step = clean_up, step

    def _wait(self) -> None:
        while True:
            ready, _, _ = select.select([self._arrived], [], [], POLL_S)
            if ready:
                number = os.read(self._arrived, 1)[0]
                if number in SIGNALS:
                    self._end(number)
            if self._agent is not None and os.getppid() != self._agent:
                self._end(signal.SIGTERM)

    def _end(self, signal_number: int) -> NoReturn:
        try:
            self._clean_up()
            if is_rank_0():
                print(f"\ninterrupted at step {self._step()}", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + signal_number)


def end_quietly_on_interrupt() -> None:
    """In a process that was started to run a program of ours, Ctrl-C ends it with one line, and exit code 130.

    Called before the first import that takes seconds, in which it would end in a traceback.
    """
    if _is_program_of_ours():
        signal.signal(signal.SIGINT, _end_quietly)


def interrupt_as_usual() -> None:
    """From here on the program itself answers KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_program_of_ours() -> bool:
    """``dist-optim``, or ``python -m dist_optim.run``: then the name of the program is not known yet, but "-m"."""
    name = sys.argv[0] if sys.argv else ""
    modules = [one.removeprefix("-m") for one in sys.orig_argv] if name == "-m" else []
    return os.path.basename(name) == "dist-optim" or any(one.startswith("dist_optim.") for one in modules)


def _end_quietly(number: int, frame: object) -> NoReturn:
    if is_rank_0():
        os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


def ignore_signals() -> None:
    """Nothing interrupts this rank any more: it is on its way out."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_rank_0() -> bool:
    """Whether this process speaks for the job; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"
