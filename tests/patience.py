"""How long a test waits for what ends by itself: no assertion is about time, and a busy machine must not reach it.

Jobs of 20 s on two quiet cores took more than two minutes beside two other busy processes and another suite of tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE_S", "wait_until"]

PATIENCE_S = 400.0  # below pytest's own limit, so that what a job has written is told


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what comes about by itself."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not so within {PATIENCE_S:g} s"
        time.sleep(0.02)
