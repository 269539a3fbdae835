"""Optimizers that ship with torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, Case

Groups = list[dict[str, Any]]


def adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups)


def adamw_fused(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def sgd(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups)


def adagrad(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, initial_accumulator_value=0.1)


def rmsprop(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups)


def muon(groups: Groups) -> torch.optim.Optimizer:
    # torch refuses vectors, even frozen ones.
    return torch.optim.Muon([{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups])


_ADAMW = Case("adamw_torch", adamw, {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.9)})
# Few elements would round differently in slices: many small tensors, whose slices are mostly the tail of a SIMD loop.
_FUSED = replace(_ADAMW, name="adamw_torch_fused", make_reference=adamw_fused, extra=(*EXTRA, *((13, 3),) * 12))
_DECAY = {"lr": 1e-2, "weight_decay": 0.05}
_ADAGRAD = Case("adagrad", adagrad, {**_DECAY, "lr_decay": 0.1}, constructor={"initial_accumulator_value": 0.1})
_RMSPROP = Case("rmsprop", rmsprop, {**_DECAY, "momentum": 0.9, "centered": True, "alpha": 0.9})
_MUON = Case(
    "muon",
    muon,
    _DECAY,
    extra=((31, 9), (9, 70)),
    frozen=("linears.4.weight", "linears.0.bias", "linears.2.bias", "linears.4.bias"),
)

CASES = (
    _ADAMW,
    replace(_ADAMW, dtype=torch.bfloat16),
    _FUSED,
    replace(_FUSED, dtype=torch.bfloat16),
    Case("sgd", sgd, {**_DECAY, "momentum": 0.9}),
    Case("sgd", sgd, _DECAY, label="without momentum"),
    _ADAGRAD,
    replace(_ADAGRAD, dtype=torch.bfloat16),
    _RMSPROP,
    replace(_RMSPROP, dtype=torch.bfloat16),
    _MUON,
    replace(_MUON, dtype=torch.bfloat16),
    replace(_MUON, hyperparameters={**_DECAY, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}, label="rms"),
)
