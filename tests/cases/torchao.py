"""torchao's quantized AdamW, with shapes on both sides of its rules: 4096 elements, and whole blocks of 256 or 128.

It compiles its update for each shape, which takes minutes on a CPU. Here both sides run that update uncompiled.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from parity import Case

LINEAR = ((64, 64), (63, 65), (40, 128), (65, 64), (96, 32), (2, 24))
"""4096 elements, 4095, 20 blocks, 16 blocks and a quarter; cut over ranks, the quantized ones fall below 4096."""
EXTRA = ((4096,), (5,), (33,), (2, 16, 16, 16))


def uncompiled(name: str, block_size: int, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The reference. The stance holds for the rest of the process: the subject that comes after is uncompiled too."""
    import torchao.optim

    torch.compiler.set_stance("force_eager")
    optimizer: torch.optim.Optimizer = getattr(torchao.optim, name)(groups, block_size=block_size)
    return optimizer


def _case(name: str, upstream: str, block_size: int) -> Case:
    return Case(
        name,
        functools.partial(uncompiled, upstream, block_size),
        {"lr": 1e-2, "weight_decay": 0.05},
        constructor={"block_size": block_size},
        steps=5,
        linear=LINEAR,
        extra=EXTRA,
    )


_8BIT = _case("adamw_torch_8bit", "AdamW8bit", 256)
_4BIT = _case("adamw_torch_4bit", "AdamW4bit", 128)

CASES = (
    _8BIT,
    replace(_8BIT, dtype=torch.bfloat16),
    _4BIT,
    replace(_4BIT, dtype=torch.bfloat16),
)
