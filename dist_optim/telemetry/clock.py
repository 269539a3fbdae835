"""The time of one step on this rank, by what it goes to; there for that step alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from dist_optim.exchange.clock import use_clock
from dist_optim.exchange.tasks import Task
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["StepClock"]

Result = TypeVar("Result")


class StepClock:
    """Put around what steps and what travels by ``start``, and taken away by ``stop``.

    On an accelerator it waits for the device wherever it looks, so that nothing overlaps while it runs.

    Args:
        parts: The optimizers underneath.

    Attributes:
        seconds: Since ``start``: in upstream's own code, and in what brings tensors to owners and back.
    """

    def __init__(self, parts: Sequence[DistributedOptimizer]) -> None:
        self._instances = [instance for part in parts for instance in part.holdings.instances]
        self._device = parts[0].holdings.placed[0].device
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """From now on."""
        self.seconds = {"upstream": 0.0, "gather": 0.0, "scatter": 0.0}
        for instance in self._instances:
            vars(instance)["step"] = self._around(instance.step)
        use_clock(self._along)

    def stop(self) -> None:
        """Leave all as it was; more than once does no harm."""
        use_clock(None)
        for instance in self._instances:
            vars(instance).pop("step", None)

    def now(self) -> float:
        """Seconds, once the device has come so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            since = self.now()
            try:
                return step(*args, **keywords)
            finally:
                self.seconds["upstream"] += self.now() - since

        return timed

    def _along(self, what: str, task: Task[Result]) -> Task[Result]:
        while True:
            since = self.now()
            try:
                next(task)
            except StopIteration as end:
                return end.value
            finally:
                self.seconds[what] += self.now() - since
            yield
