"""Prodigy: its step size grows with the distance from the start, which takes steps to be seen."""

from __future__ import annotations

from typing import Any

import torch
from parity import Case


def prodigy(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(groups, d0=1e-3)


CASES = (
    Case("prodigy", prodigy, {"lr": 1.0, "weight_decay": 0.05}, constructor={"d0": 1e-3}, growth=1.1, equal_rates=True),
)
