"""GaLore, in every projection type, through three computations of the projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import LINEAR, Case


def galore_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(groups, no_deprecation_warning=True)


# galore-torch fails on reverse_std where rank >= rows of a wide matrix: the two-row matrix is left out.
WITHOUT_TWO_ROWS = LINEAR[:-1]
_ADAMW = Case(
    "galore_adamw",
    galore_adamw,
    {"lr": 1e-2, "weight_decay": 0.05},
    {"rank": 8, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"},
)


def _projected(proj_type: str) -> Case:
    linear = WITHOUT_TWO_ROWS if proj_type == "reverse_std" else LINEAR
    return replace(_ADAMW, matrix={**_ADAMW.matrix, "proj_type": proj_type}, linear=linear, label=proj_type)


CASES = (
    *(_projected(proj_type) for proj_type in ("std", "reverse_std", "left", "right", "full")),
    replace(_ADAMW, dtype=torch.bfloat16, label="std"),
)
