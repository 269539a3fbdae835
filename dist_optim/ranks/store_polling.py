"""Waiting for a key of torch's store without its ``wait``, which writes warnings where it times out."""

from __future__ import annotations

import time

import torch.distributed as dist

__all__ = ["is_set_within"]

FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.1
"""What a rank adds at most to a long wait; of thousands each asks the store ten times a second."""


def is_set_within(store: dist.Store, key: str, timeout_s: float) -> bool:
    """Whether somebody has set the key, now or within so many seconds. Other threads may use the store meanwhile.

    ``Store.wait`` holds the client's lock, and where it times out torch writes warnings to standard error.
    """
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
    while not store.check([key]):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(pause_s, left_s))
        pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
    return True
