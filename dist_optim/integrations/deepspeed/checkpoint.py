"""DeepSpeed's own checkpoints of optimizers that train on other weights than they deliver: they hold the averaged ones.

``zero_to_fp32`` and whoever else reads the files knows nothing of schedule-free methods, and would find the weights of
the training phase. While the engine saves, the averaged weights are in its place, and the training weights ride along
in this rank's optimizer state; both are put back bit for bit, after saving and after loading.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_optim.integrations.deepspeed.push_weights import push_weights

__all__ = ["hold_averaged_weights"]


class SwapsWeights(Protocol):
    """The optimizer of an engine, as far as saving needs it."""

    training_weights: list[dict[str, Tensor]] | None

    @property
    def mode(self) -> str: ...

    def train(self) -> None: ...

    def eval(self) -> None: ...

    def copied_weights(self) -> list[dict[str, Tensor]]: ...

    def write_weights(self, weights: Sequence[Mapping[str, Tensor]]) -> None: ...


def hold_averaged_weights(engine: Any, optimizer: SwapsWeights) -> None:
    """Make this engine's ``save_checkpoint`` write averaged weights, and ``load_checkpoint`` find the training ones."""
    engine.save_checkpoint = _saving(engine, optimizer, engine.save_checkpoint)
    engine.load_checkpoint = _loading(engine, optimizer, engine.load_checkpoint)


def _saving(engine: Any, optimizer: SwapsWeights, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(*args: Any, **options: Any) -> Any:
        if optimizer.mode == "eval":
            return original(*args, **options)
        optimizer.training_weights = optimizer.copied_weights()
        optimizer.eval()
        try:
            return original(*args, **options)
        finally:
            _train_on(engine, optimizer)

    return save_checkpoint


def _loading(engine: Any, optimizer: SwapsWeights, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(*args: Any, **options: Any) -> Any:
        loaded = original(*args, **options)
        if optimizer.training_weights is not None:
            _train_on(engine, optimizer)
        return loaded

    return load_checkpoint


@torch.no_grad()
def _train_on(engine: Any, optimizer: SwapsWeights) -> None:
    """Back to training, on the very bits that were set aside: upstream's own way back would round."""
    weights, optimizer.training_weights = optimizer.training_weights, None
    assert weights is not None
    optimizer.train()
    optimizer.write_weights(weights)
    push_weights(engine)
