"""Whose clock runs while tensors travel: nobody's, but for the steps that somebody measures."""

from __future__ import annotations

from typing import Protocol, TypeVar

from dist_optim.exchange.tasks import Task

__all__ = ["Clock", "timed", "use_clock"]

Result = TypeVar("Result")


class Clock(Protocol):
    """Takes the time of a generator, without what happens while it waits."""

    def __call__(self, what: str, task: Task[Result]) -> Task[Result]:
        """The same generator, timed; ``what`` is "gather" or "scatter"."""


_clock: Clock | None = None


def use_clock(clock: Clock | None) -> None:
    """From now on this clock, or none, runs on this rank."""
    global _clock
    _clock = clock


def timed(what: str, task: Task[Result]) -> Task[Result]:
    """The generator itself where nobody measures."""
    return task if _clock is None else _clock(what, task)
