"""Adafactor, factored and not, with every source of its learning rate; growing gradients let the clip bind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, Case


def adafactor(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, scale_parameter=False, relative_step=False)


def adafactor_relative(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups)


# 3-D and 4-D tensors are factored over their last two dimensions.
_ADAFACTOR = Case("adafactor", adafactor, {"lr": 1e-2, "weight_decay": 0.05}, extra=(*EXTRA, (5, 7, 3), (4, 3, 2, 2)))
_SCALED = replace(
    _ADAFACTOR,
    hyperparameters={**_ADAFACTOR.hyperparameters, "scale_parameter": True, "beta1": 0.9},
    label="scaled, with momentum",
)

CASES = (
    _ADAFACTOR,
    replace(_ADAFACTOR, dtype=torch.bfloat16),
    _SCALED,
    replace(_SCALED, dtype=torch.bfloat16),
    replace(
        _ADAFACTOR,
        make_reference=adafactor_relative,
        hyperparameters={"weight_decay": 0.05},
        constructor={"relative_step": True, "scale_parameter": True},
        label="relative steps",
    ),
)
