"""bitsandbytes: shapes on both sides of 4096 elements, and others that blocks of 256 do not divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import Case

LINEAR = ((64, 64), (63, 65), (131, 40), (40, 131), (96, 64))
"""4096 and 4095 elements; 5240, which is 20.5 blocks and 2620 on each of two ranks; 6144 (frozen)."""
EXTRA = ((4099,), (33,), (17, 16, 16), (3, 5, 7, 41))


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups)


def lion(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion8bit

    return Lion8bit(groups)


def adamw_from_1024(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, min_8bit_size=1024)


_ADAMW = Case(
    "adamw_bnb_8bit",
    adamw,
    {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.95)},
    linear=LINEAR,
    extra=EXTRA,
    steps=6,
)
_LION = replace(_ADAMW, name="lion_8bit", make_reference=lion)

CASES = (
    _ADAMW,
    replace(_ADAMW, dtype=torch.bfloat16),
    replace(
        _ADAMW,
        make_reference=adamw_from_1024,
        hyperparameters={**_ADAMW.hyperparameters, "min_8bit_size": 1024},
        label="8 bits from 1024 elements on",
    ),
    _LION,
    replace(_LION, dtype=torch.bfloat16),
)
