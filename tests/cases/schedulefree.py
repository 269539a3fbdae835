"""Schedule-free methods: counters in the groups, warm-up, and weights that stand for an average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import Case

Groups = list[dict[str, Any]]


def adamw(groups: Groups) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(groups)


def radam(groups: Groups) -> torch.optim.Optimizer:
    from schedulefree import RAdamScheduleFree

    return RAdamScheduleFree(groups)


def sgd(groups: Groups) -> torch.optim.Optimizer:
    from schedulefree import SGDScheduleFree

    return SGDScheduleFree(groups)


_AVERAGED = {"lr": 1e-2, "weight_decay": 0.05, "r": 0.5}
_ADAMW = Case("schedule_free_adamw", adamw, {**_AVERAGED, "warmup_steps": 4})
# The decay lets RAdam's rectified steps begin at the fifth of nine.
_RADAM = Case("schedule_free_radam", radam, {**_AVERAGED, "betas": (0.9, 0.99)})
_SGD = Case("schedule_free_sgd", sgd, {**_AVERAGED, "warmup_steps": 4, "momentum": 0.8})

CASES = (
    _ADAMW,
    replace(_ADAMW, dtype=torch.bfloat16),
    _RADAM,
    replace(_RADAM, dtype=torch.bfloat16),
    replace(_RADAM, hyperparameters={**_RADAM.hyperparameters, "silent_sgd_phase": False}, label="sgd first"),
    _SGD,
    replace(_SGD, dtype=torch.bfloat16),
)
