"""Optimizers that ship with torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, LINEAR, Case, Net, Together

Groups = list[dict[str, Any]]
HEAD = [name for name, _ in Net(LINEAR, EXTRA).named_parameters()].index(f"linears.{len(LINEAR) - 1}.weight")
"""The place in the model of the last linear layer's weight."""


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
    """Muon on the hidden matrices, and AdamW on the rest: the last linear layer, and what decays not."""
    decays, does_not = groups
    hidden = [p for p in decays["params"] if p.ndim == 2 and p.place_in_model != HEAD]
    others = [p for p in decays["params"] if p.ndim != 2 or p.place_in_model == HEAD]
    return Together(
        torch.optim.Muon([{**decays, "params": hidden}]),
        torch.optim.AdamW([{**decays, "params": others}, does_not]),
    )


_ADAMW = Case("adamw_torch", adamw, {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.9)})
# Few elements would round differently in slices: many small tensors, whose slices are mostly the tail of a SIMD loop.
_FUSED = replace(_ADAMW, name="adamw_torch_fused", make_reference=adamw_fused, extra=(*EXTRA, *((13, 3),) * 12))
_DECAY = {"lr": 1e-2, "weight_decay": 0.05}
_ADAGRAD = Case("adagrad", adagrad, {**_DECAY, "lr_decay": 0.1}, constructor={"initial_accumulator_value": 0.1})
_RMSPROP = Case("rmsprop", rmsprop, {**_DECAY, "momentum": 0.9, "centered": True, "alpha": 0.9})
_MUON = Case("muon", muon, _DECAY, extra=(*EXTRA, (9, 70)))

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
