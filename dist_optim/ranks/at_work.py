"""Long work tells who watches rank 0's terminal what it is, and how long it has taken; nobody else, and nothing else.

A bar of tqdm's, below those that a training loop has; without tqdm, or a terminal, there is none.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from dist_optim.ranks.agreement import own_rank

__all__ = ["at_work"]

DELAY_S = 3.0
"""What takes less is not worth a line."""
POLL_S = 0.5

_under_way: list[tuple[str, float]] = []
"""What is done now and since when, the innermost last."""
_watcher: threading.Thread | None = None


@contextmanager
def at_work(doing: str) -> Iterator[None]:
    """While this lasts, say so, once it has lasted a while. Local, and without effect on what is done.

    Args:
        doing: For a person: ``"saving runs/a/checkpoint-500"``.
    """
    if not _is_watched():
        yield
        return
    _start_watcher()
    entry = (doing, time.monotonic())
    _under_way.append(entry)
    try:
        yield
    finally:
        _under_way.remove(entry)


def _is_watched() -> bool:
    return sys.__stderr__ is not None and sys.__stderr__.isatty() and own_rank() == 0 and _has_tqdm()


@cache
def _has_tqdm() -> bool:
    return importlib.util.find_spec("tqdm") is not None


def _start_watcher() -> None:
    global _watcher
    if _watcher is None or not _watcher.is_alive():  # a forked process has none of its threads
        _watcher = threading.Thread(target=_watch, name="dist_optim at work", daemon=True)
        _watcher.start()


def _watch() -> None:
    from tqdm import tqdm

    shown: tuple[tuple[str, float], Any] | None = None
    while True:
        time.sleep(POLL_S)
        entry = next(iter(_under_way[-1:]), None)
        if shown is not None and shown[0] is not entry:
            shown[1].close()
            shown = None
        if entry is None or time.monotonic() - entry[1] < DELAY_S:
            continue
        if shown is None:
            bar = tqdm(desc=entry[0], bar_format="{desc}: {elapsed}", leave=False, file=sys.__stderr__)
            bar.start_t -= time.monotonic() - entry[1]
            shown = entry, bar
        shown[1].refresh()
