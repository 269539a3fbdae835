"""StableAdamW: growing gradients let its limiter bind (below that it is AdamW, under any sharding)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, Case

BETAS = (0.9, 0.95)


def stable_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from optimi import StableAdamW

    # Upstream's own choice of Triton fails on a CPU.
    return StableAdamW(groups, lr=1e-2, betas=BETAS, eps=1e-8, triton=False)


def without_compensation(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from optimi import StableAdamW

    return StableAdamW(groups, lr=1e-2, betas=BETAS, eps=1e-8, triton=False, kahan_sum=False)


def fully_decoupled(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from optimi import StableAdamW

    return StableAdamW(groups, lr=1e-2, betas=BETAS, eps=1e-8, triton=False, decouple_lr=True, max_lr=2e-2)


_STABLE = Case(
    "stable_adamw",
    stable_adamw,
    {"lr": 1e-2, "weight_decay": 0.05},
    constructor={"betas": BETAS},
    extra=(*EXTRA, (5, 7, 3)),
)

CASES = (
    _STABLE,
    replace(_STABLE, dtype=torch.bfloat16, label="compensated"),
    replace(
        _STABLE,
        make_reference=without_compensation,
        constructor={"betas": BETAS, "kahan_sum": False},
        dtype=torch.bfloat16,
        label="not compensated",
    ),
    replace(
        _STABLE,
        make_reference=fully_decoupled,
        hyperparameters={"lr": 1e-2, "weight_decay": 5e-4},
        constructor={"betas": BETAS, "decouple_lr": True, "max_lr": 2e-2},
        label="fully decoupled",
    ),
)
