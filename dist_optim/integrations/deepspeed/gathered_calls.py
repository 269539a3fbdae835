"""All ``step()`` calls of a training step as one, for an optimizer that needs every gradient at once.

DeepSpeed shows the optimizer one param group (at stage 3, one sub-group) after another. When a call returns it frees
the gradients of that one, and copies its fp32 weights into the model. Such an optimizer steps in the last call: until
then gradients are kept, and after it the weights of earlier calls are copied once more. DeepSpeed sends them to the
other ranks when all its calls are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dist_optim.layouts.detect_zero import Call

__all__ = ["GatheredCalls"]


class GatheredCalls:
    """The calls of one training step, in DeepSpeed's order, the last of which steps for all.

    Args:
        calls: All of them.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._earlier = list(calls[:-1])
        self.whole = Call({name: part for call in calls for name, part in call.slices.items()})
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep_gradients(self, number: int) -> bool:
        """Set aside what DeepSpeed shows in this call, unless it is the last; says whether it did. Local."""
        if number == 0:
            self._kept.clear()  # of a training step that was broken off
        if number == len(self._earlier):
            return False
        lives = {id(part.live): part.live for part in self._earlier[number].slices.values()}
        self._kept += [(live, live.grad.clone()) for live in lives.values() if live.grad is not None]
        return True

    @contextmanager
    def shown(self) -> Iterator[None]:
        """In the last call: the gradients of all calls where their slices look for them."""
        now = [live.grad for live, _ in self._kept]
        for live, gradient in self._kept:
            live.grad = gradient
        try:
            yield
        finally:
            for (live, _), before in zip(self._kept, now, strict=True):
                live.grad = before
            self._kept.clear()

    def write_model(self) -> None:
        """Copy the weights of earlier calls into the model: DeepSpeed did so when each of them returned. Local."""
        for call in self._earlier:
            for part in call.slices.values():
                part.model_values().copy_(part.weight())
