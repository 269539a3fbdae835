"""Lion, Adan, ADOPT, LAMB, CAME and MARS of pytorch-optimizer: foreach paths, and bounds that couple tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from parity import EXTRA, Case

Groups = list[dict[str, Any]]


def lion(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return Lion(groups)


def adan(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Adan

    return Adan(groups)


def adan_clipped(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Adan

    return Adan(groups, max_grad_norm=20.0)


def adopt(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import ADOPT

    return ADOPT(groups)


def lamb(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lamb

    return Lamb(groups)


def lamb_clipped(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lamb

    return Lamb(groups, pre_norm=True, max_grad_norm=20.0)


def came(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import CAME

    return CAME(groups)


def mars(groups: Groups) -> torch.optim.Optimizer:
    from pytorch_optimizer import MARS

    return MARS(groups, lr=1e-2)  # which lr_1d is relative to


_DECAY = {"lr": 1e-2, "weight_decay": 0.05}
_SIDES = (*EXTRA, (5, 7, 3))
_LION = Case("lion", lion, {**_DECAY, "lr": 1e-3})
_ADAN = Case("adan", adan, _DECAY)
_ADOPT = Case("adopt", adopt, _DECAY)
_LAMB = Case("lamb", lamb, _DECAY, extra=_SIDES)
_CAME = Case("came", came, _DECAY, extra=_SIDES)
_MARS = Case("mars", mars, _DECAY, extra=_SIDES)

CASES = (
    _LION,
    replace(_LION, dtype=torch.bfloat16),
    _ADAN,
    replace(_ADAN, make_reference=adan_clipped, constructor={"max_grad_norm": 20.0}, label="clipped"),
    _ADOPT,
    _LAMB,
    replace(_LAMB, make_reference=lamb_clipped, constructor={"pre_norm": True, "max_grad_norm": 20.0}, label="clipped"),
    _CAME,
    replace(_CAME, dtype=torch.bfloat16),
    _MARS,
    replace(_MARS, hyperparameters={**_DECAY, "mars_type": "shampoo"}, label="shampoo"),
)
