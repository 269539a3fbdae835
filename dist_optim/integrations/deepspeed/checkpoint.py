"""DeepSpeed's own checkpoints of optimizers that train on other weights than they deliver: they hold the averaged ones.

``zero_to_fp32`` and whoever else reads the files knows nothing of schedule-free methods, and would find the weights of
the training phase. While the engine saves, the averaged weights are in its place, and the training weights ride along
in this rank's optimizer state; both are put back bit for bit, after saving and after loading.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dist_optim.layouts.detect_zero import push_weights

if TYPE_CHECKING:
    from dist_optim.integrations.deepspeed.optimizer import ZeroOptimizer

__all__ = ["hold_averaged_weights"]


def hold_averaged_weights(engine: Any, optimizer: ZeroOptimizer) -> None:
    """Make this engine's ``save_checkpoint`` write averaged weights, and ``load_checkpoint`` find the training ones."""
    engine.save_checkpoint = _saving(engine, optimizer, engine.save_checkpoint)
    engine.load_checkpoint = _loading(engine, optimizer, engine.load_checkpoint)


def _saving(engine: Any, optimizer: ZeroOptimizer, original: Callable[..., Any]) -> Callable[..., Any]:
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


def _loading(engine: Any, optimizer: ZeroOptimizer, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(*args: Any, **options: Any) -> Any:
        loaded = original(*args, **options)
        if optimizer.training_weights is not None:
            _train_on(engine, optimizer)
        return loaded

    return load_checkpoint


@torch.no_grad()
def _train_on(engine: Any, optimizer: ZeroOptimizer) -> None:
    """Back to training, on the very bits that were set aside: upstream's own way back would round."""
    weights, optimizer.training_weights = optimizer.training_weights, None
    assert weights is not None
    optimizer.train()
    optimizer.write_weights(weights)
    push_weights(engine)
