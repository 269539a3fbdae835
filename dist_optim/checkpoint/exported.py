"""The weights to evaluate and export, for as long as it takes, without touching the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_optim.checkpoint.optimizer_state import optimizer_of
from dist_optim.specs.registry import Trait

__all__ = ["exported_weights"]


@contextmanager
def exported_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the model holds the weights to export; afterwards its training weights are back, to the bit.

    They differ for optimizers that average (schedule-free); for all others nothing happens. There and back through
    ``eval()`` and ``train()`` alone would round, and so saving would change the run. Collective on all ranks.

    Args:
        optimizer: A ``DistributedOptimizer``, or accelerate's wrapper around one.
    """
    inner = optimizer_of(optimizer)
    if Trait.WEIGHT_SWAPPING not in inner.spec.traits or inner.mode == "eval":
        yield
        return
    swapped = [inner.holdings.placed[index] for index in inner.holdings.trained]
    kept = [placed.local().to("cpu", copy=True) for placed in swapped]  # no second copy beside the model
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for placed, local in zip(swapped, kept, strict=True):
                placed.local().copy_(local)
        inner.free_gathered_copies()
