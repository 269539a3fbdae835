"""Rounds as generators that yield while their messages are in flight, so that a few of them overlap.

They yield equally often on every rank, whether the rank owns anything or not: that keeps the order of collectives equal
everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

__all__ = ["Task", "run_tasks"]

Result = TypeVar("Result")
Task = Generator[None, None, Result]


def run_tasks(tasks: Iterable[Task[None]], holds_memory: bool = True) -> None:
    """Advance generators in one order on every rank, so that collectives are in flight while tensors are stepped.

    The next bucket's gather is started before a bucket is stepped, and its scatter has the time of the next step to
    arrive. So three buckets are in flight at the most; or all of them, where none holds memory on its way back: then no
    owner waits for what another one steps.
    """
    waiting, gathering, returning = iter(tasks), deque[Task[None]](), deque[Task[None]]()
    _start(waiting, gathering)
    while gathering:
        _start(waiting, gathering)
        task = gathering.popleft()
        if _goes_on(task):
            returning.append(task)
        if holds_memory and len(returning) > 1:
            _finish(returning.popleft())
    for task in returning:
        _finish(task)


def _start(waiting: Iterator[Task[None]], gathering: deque[Task[None]]) -> None:
    task = next(waiting, None)
    if task is not None and _goes_on(task):
        gathering.append(task)


def _goes_on(task: Task[None]) -> bool:
    """Advance it to where it waits for its next collective; False at its end."""
    try:
        next(task)
    except StopIteration:
        return False
    return True


def _finish(task: Task[None]) -> None:
    while _goes_on(task):
        pass
