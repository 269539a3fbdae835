"""How long a test waits for what ends by itself: no assertion is about time, and a busy machine must not reach it.

Jobs of 20 s on two quiet cores took more than two minutes beside two other busy processes and another suite of tests.
"""

from __future__ import annotations

__all__ = ["PATIENCE_S"]

PATIENCE_S = 400.0  # below pytest's own limit, so that what a job has written is told
