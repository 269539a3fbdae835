"""SOAP, Shampoo and Kron: new bases in the middle of the run, sides too long for one, and random draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, Case

Groups = list[dict[str, Any]]


def soap(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(groups)


def shampoo(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Shampoo

    return Shampoo(groups)


def kron(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Kron

    return Kron(groups, balance_prob=0.3)


_DECAY = {"lr": 1e-2, "weight_decay": 0.05}
_SOAP = Case("soap", soap, {**_DECAY, "precondition_frequency": 3}, extra=(*EXTRA, (5, 7, 3)))
_SHAMPOO = Case("shampoo", shampoo, {**_DECAY, "momentum": 0.5}, steps=5)

CASES = (
    _SOAP,
    replace(_SOAP, hyperparameters={**_SOAP.hyperparameters, "max_precondition_dim": 60}, label="long sides"),
    _SHAMPOO,
    Case("kron", kron, _DECAY, constructor={"balance_prob": 0.3}, steps=6, draws=True),
)
