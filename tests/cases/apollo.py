"""APOLLO with random and singular vectors, by channel and by tensor, through three computations of the projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import Case


def apollo(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(groups)


def apollo_scaled_in_front(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(groups, scale_front=True)


def apollo_without_limiter(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(groups, disable_nl=True)


MATRIX = {
    "rank": 8,
    "update_proj_gap": 3,
    "scale": 1.0,
    "proj_type": "std",
    "proj": "random",
    "scale_type": "channel",
}


def matrix(**changed: Any) -> dict[str, Any]:
    return {**MATRIX, **changed}


# Gradients grow by 1.4 a step, so the limiter on growing norms (1.01 a step) binds at every step.
_APOLLO = Case("apollo_adamw", apollo, {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.9), "eps": 1e-7}, matrix())
_MINI = replace(_APOLLO, name="apollo_mini", matrix=matrix(rank=1, scale_type="tensor", scale=128.0), label="random")

CASES = (
    replace(_APOLLO, label="random"),
    replace(_APOLLO, label="random", dtype=torch.bfloat16),
    replace(_APOLLO, matrix=matrix(proj="svd"), label="svd"),
    replace(_APOLLO, matrix=matrix(proj="svd"), label="svd", dtype=torch.bfloat16),
    replace(
        _APOLLO,
        matrix=matrix(proj_type="reverse_std", scale_type="tensor"),
        label="longer side, by tensor",
    ),
    replace(
        _APOLLO,
        make_reference=apollo_scaled_in_front,
        hyperparameters={**_APOLLO.hyperparameters, "scale_front": True},
        matrix=matrix(scale=4.0),
        label="scale in front",
    ),
    replace(
        _APOLLO,
        make_reference=apollo_without_limiter,
        hyperparameters={**_APOLLO.hyperparameters, "disable_nl": True},
        label="without limiter",
    ),
    _MINI,
    replace(_MINI, dtype=torch.bfloat16),
)
