"""The closure of a step as a class gets it that is to evaluate it once: what it returned, before the step."""

from __future__ import annotations

from typing import Any

from dist_optim.errors import UnsupportedError

__all__ = ["Once"]


class Once:
    """Answers one call.

    Args:
        loss: What the closure returned.
        name: The optimizer's, for the message.
        remedy: Why a second evaluation cannot be had, and what to do.
    """

    def __init__(self, loss: Any, name: str, remedy: str) -> None:
        self._loss, self._name, self._remedy = loss, name, remedy
        self._is_used = False

    def again(self) -> Once:
        """The same for another instance, which evaluates its own."""
        return Once(self._loss, self._name, self._remedy)

    def __call__(self) -> Any:
        if self._is_used:
            raise UnsupportedError(f"{self._name} evaluates its closure a second time in one step, {self._remedy}")
        self._is_used = True
        return self._loss
