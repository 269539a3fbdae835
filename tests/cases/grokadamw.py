"""GrokAdamW: growing gradients let its clip bind, parameters without gradients shift the positions of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, Case


def grokadamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from grokadamw import GrokAdamW

    return GrokAdamW(groups)


_GROK = Case("grokadamw", grokadamw, {"lr": 1e-2, "weight_decay": 0.05, "gamma": 0.2}, extra=(*EXTRA, (5, 7, 3)))

CASES = (
    _GROK,
    replace(_GROK, dtype=torch.bfloat16),
    replace(
        _GROK, hyperparameters={**_GROK.hyperparameters, "train_loss": 1.0, "eval_loss": 3.0}, label="grokking signal"
    ),
)
