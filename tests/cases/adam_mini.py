"""Adam-mini: one group a parameter, and its blocks by name."""

from __future__ import annotations

from typing import Any, cast

import torch
from parity import EXPERTS, EXTRA, LINEAR, Case, Net


class Named:
    """What upstream reads of a model."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        names = [name for name, _ in Net(LINEAR, EXTRA, EXPERTS).named_parameters()]
        self.listed = [(names[one.place_in_model], one) for group in groups for one in group["params"]]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self.listed


def adam_mini(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdamMini

    optimizer = AdamMini(cast("Any", Named(groups)))  # typed or not, as pytorch-optimizer is installed
    decay = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    for group in optimizer.param_groups:
        group["weight_decay"] = decay[id(group["params"][0])]
    return optimizer


CASES = (Case("adam_mini", adam_mini, {"lr": 1e-2, "weight_decay": 0.05}, equal_rates=True),)
