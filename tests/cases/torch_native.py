"""Optimizers that ship with torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import Case


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups)


_ADAMW = Case("adamw_torch", adamw, {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.9)})

CASES = (
    _ADAMW,
    replace(_ADAMW, dtype=torch.bfloat16),
    Case("sgd", sgd, {"lr": 1e-2, "weight_decay": 0.05, "momentum": 0.9}),
    Case("sgd", sgd, {"lr": 1e-2, "weight_decay": 0.05}, label="without momentum"),
)
