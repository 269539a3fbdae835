"""FlashOptim in its plain mode, which runs without CUDA. Its kernels: ``test_flash_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from parity import Case

Groups = list[dict[str, Any]]
PLAIN: dict[str, Any] = {"quantize": False, "fused": False, "master_weight_bits": None}


def flash_adamw(groups: Groups) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(groups, **PLAIN)


def flash_adamw_decoupled(groups: Groups) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(groups, lr=1e-2, decouple_lr=True, **PLAIN)  # decays by lr / the constructor's lr


def flash_adam(groups: Groups) -> torch.optim.Optimizer:
    from flashoptim import FlashAdam

    return FlashAdam(groups, **PLAIN)


def flash_sgd(groups: Groups) -> torch.optim.Optimizer:
    from flashoptim import FlashSGD

    return FlashSGD(groups, momentum=0.9, nesterov=True, **PLAIN)  # its check reads the constructor alone


def flash_sgdw(groups: Groups) -> torch.optim.Optimizer:
    from flashoptim import FlashSGDW

    return FlashSGDW(groups, **PLAIN)


def flash_lion(groups: Groups) -> torch.optim.Optimizer:
    from flashoptim import FlashLion

    return FlashLion(groups, **PLAIN)


_LR = {"lr": 1e-2, "weight_decay": 0.05}


def _plain(make_reference: Callable[[Groups], torch.optim.Optimizer], **hyperparameters: Any) -> Case:
    return Case(make_reference.__name__, make_reference, {**_LR, **hyperparameters}, constructor=PLAIN)


_ADAMW = _plain(flash_adamw, betas=(0.8, 0.9))
_ADAM = _plain(flash_adam)
_LION = _plain(flash_lion, betas=(0.7, 0.9))

CASES = (
    _ADAMW,
    replace(_ADAMW, dtype=torch.bfloat16),
    replace(
        _ADAMW,
        make_reference=flash_adamw_decoupled,
        constructor={**PLAIN, "decouple_lr": True},
        label="decoupled decay",
    ),
    _ADAM,
    replace(_ADAM, dtype=torch.bfloat16),
    replace(_plain(flash_sgd, momentum=0.9), constructor={**PLAIN, "nesterov": True}, label="nesterov"),
    replace(_plain(flash_sgdw, momentum=0.9, dampening=0.5), label="dampened"),
    replace(_plain(flash_sgdw), label="without momentum", dtype=torch.bfloat16),
    _LION,
    replace(_LION, dtype=torch.bfloat16),
)
