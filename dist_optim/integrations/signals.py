"""How a rank of a script ends when it is told to: SIGINT (Ctrl-C) or SIGTERM. Imports nothing heavy."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

__all__ = ["SignalWatch", "ignore_signals", "is_rank_0"]

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


def ignore_signals() -> None:
    """Nothing interrupts this rank any more: it is on its way out."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_rank_0() -> bool:
    """Whether this process speaks for the job; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"
