"""``step(closure)``: the closure of a class that evaluates it is carried out by all ranks, when the stepping rank asks.

Loss and gradients of one process are means over the global batch: so is the loss that upstream gets, and the gradients
are those that the engine has reduced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import DistOptimError
from dist_optim.ranks.agreement import gather_objects, num_ranks
from dist_optim.ranks.together import together
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.bystander import Bystander
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.sharing import broadcast_from_owner

__all__ = ["ON_MANY_RANKS", "Evaluations", "evaluates", "loss_of", "mean_loss"]

Closure = Callable[[], Any]
ON_MANY_RANKS = (
    "which it never did when it was tried out; its tensors are stepped on several ranks. Build it with "
    "independent=False: one rank steps all of them, and evaluates as often as it likes."
)
_GO_ON, _DONE = "evaluate", "done"


def evaluates(spec: OptimizerSpec) -> bool:
    """Whether upstream itself is to evaluate a closure, as often as it likes: where one rank steps everything."""
    return spec.is_undescribed and (spec.verdict is None or not spec.verdict.is_independent)


def loss_of(closure: Closure) -> Any:
    """What the closure returns, with gradients recorded."""
    with torch.enable_grad():
        return closure()


def mean_loss(loss: Any, ranks: dist.ProcessGroup | None) -> Any:
    """The mean over the ranks, as upstream gets it in one process; None, or what is no number, stays. Collective."""
    if num_ranks(ranks) == 1:
        return loss
    value = loss.detach().double().item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
    values = gather_objects(value if isinstance(value, (int, float)) else None, ranks)
    if None in values or all(one == values[0] for one in values):  # a mean of equal numbers may round to another
        return loss
    mean = sum(values) / len(values)
    return loss.detach().new_tensor(mean).view(loss.shape) if isinstance(loss, Tensor) else mean


class Evaluations:
    """The evaluations of one step. The stepping rank calls it; the others ``serve`` until it is ``done``.

    Args:
        closure: The user's; it makes forward and backward passes on every rank.
        held: What is stepped.
        before: Lets the model have upstream's weights. Collective.
        after: Lets upstream have the gradients. Collective.
    """

    def __init__(self, closure: Closure, held: Holdings, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._closure = closure
        self._held = held
        self._before = before
        self._after = after
        self.returned: Any = None
        """What upstream's step returned, on every rank, when it is done."""

    def __call__(self) -> Any:
        """One evaluation, asked for by upstream, on all ranks."""
        self._say((_GO_ON, None))
        return self._evaluate()

    def serve(self) -> None:
        """Take part in all evaluations of the rank that steps."""
        word, self.returned = self._say(None)
        while word == _GO_ON:
            # An error here is one of all ranks: the rank that steps notes it, and ends the step for all.
            with contextlib.suppress(DistOptimError):
                self._evaluate()
            word, self.returned = self._say(None)

    def done(self, returned: Any) -> None:
        """No more in this step, which has returned this."""
        self.returned = returned.detach() if isinstance(returned, Tensor) else returned
        self._say((_DONE, self.returned if isinstance(self.returned, (Tensor, int, float, type(None))) else None))

    @property
    def is_asking(self) -> bool:
        """Whether this rank is the one that steps."""
        return not any(isinstance(instance, Bystander) for instance in self._held.instances)

    def _say(self, word: tuple[str, Any] | None) -> tuple[str, Any]:
        if word is not None and num_ranks(self._held.process_group) == 1:
            return word
        said: tuple[str, Any] = broadcast_from_owner(word, self._held)
        return said

    def _evaluate(self) -> Any:
        ranks = self._held.all_ranks
        with torch.no_grad():
            self._before()
        loss = together(lambda: loss_of(self._closure), ranks, doing="Evaluating the closure")
        loss = mean_loss(loss, ranks)
        with torch.no_grad():
            self._after()
        return loss
