"""GaLore, in every projection type, through three computations of the projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from parity import LINEAR, Case


def galore_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(groups, no_deprecation_warning=True)


def galore_adafactor(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdafactor

    # Its defaults are relative_step=True, scale_parameter=True; the Trainer turns both off.
    return GaLoreAdafactor(groups, relative_step=False, scale_parameter=False)


def galore_adamw_8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Upstream with the least that makes it run: arguments that bitsandbytes 0.50 shifts, and CUDA's absence."""
    from galore_torch import GaLoreAdamW8bit

    class OnCpu(GaLoreAdamW8bit):
        def step(self, closure: Any = None) -> Any:
            with mock.patch("torch.cuda.synchronize"):
                return super().step(closure)

    optimizer = OnCpu(groups)
    optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.0, False
    return optimizer


# galore-torch fails on reverse_std where rank >= rows of a wide matrix: the two-row matrix is left out.
WITHOUT_TWO_ROWS = LINEAR[:-1]
_ADAMW = Case(
    "galore_adamw",
    galore_adamw,
    {"lr": 1e-2, "weight_decay": 0.05},
    {"rank": 8, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"},
)


_ADAFACTOR = replace(_ADAMW, name="galore_adafactor", make_reference=galore_adafactor)
_8BIT = replace(
    _ADAMW,
    name="galore_adamw_8bit",
    make_reference=galore_adamw_8bit,
    # Low-rank states of 520 x 8 and 8 x 515 elements are quantized, 512 x 7 and those of LINEAR are not; 520 rows on
    # two ranks are 2080 elements each; 4099 and 67 x 67 elements are no multiple of the block, 4095 are too few.
    linear=(*LINEAR, (520, 24), (24, 515), (512, 7)),
    extra=((33,), (5,), (4099,), (67, 67), (4095,)),
    steps=7,
)


def _projected(case: Case, proj_type: str) -> Case:
    linear = WITHOUT_TWO_ROWS if proj_type == "reverse_std" else case.linear
    return replace(case, matrix={**case.matrix, "proj_type": proj_type}, linear=linear, label=proj_type)


def _with(case: Case, label: str, **hyperparameters: Any) -> Case:
    return replace(case, hyperparameters={**case.hyperparameters, **hyperparameters}, label=label)


CASES = (
    *(_projected(_ADAMW, proj_type) for proj_type in ("std", "reverse_std", "left", "right", "full")),
    replace(_ADAMW, dtype=torch.bfloat16, label="std"),
    _projected(_ADAFACTOR, "std"),
    _projected(_ADAFACTOR, "full"),
    replace(_ADAFACTOR, dtype=torch.bfloat16, label="std"),
    _with(_ADAFACTOR, "scaled by the parameter, first moment", scale_parameter=True, beta1=0.9),
    replace(_with(_ADAFACTOR, "first moment", beta1=0.9), dtype=torch.bfloat16),
    _8BIT,
    _projected(_8BIT, "left"),
    replace(_8BIT, dtype=torch.bfloat16),
)
