"""The weights to evaluate and export, for as long as it takes, without touching the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_optim.checkpoint.engine_view import view_of
from dist_optim.specs.registry import Trait

__all__ = ["exported_weights"]


@contextmanager
def exported_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the model holds the weights to export; afterwards its training weights are back, to the bit.

    They differ for optimizers that average (schedule-free); for all others nothing happens. There and back through
    ``eval()`` and ``train()`` alone would round, and so saving would change the run. Collective on all ranks.

    Args:
        optimizer: A ``DistributedOptimizer``, DeepSpeed's ``engine.optimizer``, or accelerate's wrapper around one.
    """
    view = view_of(optimizer)
    inner = view.optimizer
    if Trait.WEIGHT_SWAPPING not in view.spec.traits or inner.mode == "eval":
        yield
        return
    view.look()
    kept = [one.local().to("cpu", copy=True) for one in view.training_weights()]  # no second copy beside the model
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for one, local in zip(view.training_weights(), kept, strict=True):
                one.local().copy_(local)
        view.refresh()
