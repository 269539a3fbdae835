"""LOMO and AdaLomo against lomo-optim's own classes, which step whole models of one rate inside their hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from parity import Case
from torch import Tensor, nn


class FromUpstream(torch.optim.Optimizer):
    """Param groups over lomo-optim: one instance for each parameter, whose hook function is called from ``step``.

    Gradients are scaled as lomo-optim scales the loss; a first round gathers norms, where they are clipped by norm.
    """

    def __init__(self, groups: list[dict[str, Any]], upstream: str, **arguments: Any) -> None:
        super().__init__(groups, {"weight_decay": 0.0})
        self.upstream = upstream
        self.arguments = arguments
        self.instances: dict[Tensor, Any] = {}

    def instance(self, parameter: nn.Parameter, weight_decay: float) -> Any:
        import lomo_optim

        if parameter not in self.instances:
            # AdaLomo's state goes to a GPU, whatever the model's device.
            with mock.patch.object(Tensor, "cuda", lambda tensor: tensor.to(parameter.device)):
                self.instances[parameter] = getattr(lomo_optim, self.upstream)(
                    nn.ParameterList([parameter]), weight_decay=weight_decay, **self.arguments
                )
        return self.instances[parameter]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        given: list[tuple[Any, nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                instance = self.instance(parameter, group["weight_decay"])
                instance.lr = group["lr"]
                if hasattr(instance, "step_num"):
                    instance.step_num += 1
                if parameter.grad is not None:
                    given.append((instance, parameter, parameter.grad * getattr(instance, "loss_scale", 1.0)))
        coefficient = self.coefficient(given) if "clip_grad_norm" in self.arguments else None
        for instance, parameter, gradient in given:
            instance.clip_coef = coefficient
            parameter.grad = gradient
            instance.grad_func(0)

    def coefficient(self, given: list[tuple[Any, nn.Parameter, Tensor]]) -> Tensor:
        norms = []
        for instance, parameter, gradient in sorted(given, key=lambda one: one[1].place_in_model):  # type: ignore[attr-defined]
            parameter.grad, instance.grad_norms, instance.gather_norm = gradient.clone(), [], True
            instance.grad_func(0)
            norms += instance.grad_norms
            instance.gather_norm = False
        total = torch.norm(torch.stack(norms), 2.0)
        return torch.clamp(float(self.arguments["clip_grad_norm"]) / (total + 1e-6), max=1.0)


def lomo(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return FromUpstream(groups, "Lomo")


def lomo_clipped(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return FromUpstream(groups, "Lomo", **CLIPS)


def adalomo(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return FromUpstream(groups, "AdaLomo")


def adalomo_clipped(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return FromUpstream(groups, "AdaLomo", **CLIPS, **OTHER)


STORED = {"fused_backward": False}
"""These cases step from gradients that are put in place; ``test_fused_backward`` steps the same inside backward."""
CLIPS = {"clip_grad_value": 1.5, "clip_grad_norm": 60.0}
"""The value binds from the first step on, the norm (of about 120, and growing) as well."""
OTHER = {"eps": (1e-8, 0.2), "clip_threshold": 0.7, "decay_rate": -0.6, "loss_scale": 64.0}
"""The least scale of a parameter binds for some, and not for others."""

_LOMO = Case("lomo", lomo, {"lr": 1e-2, "weight_decay": 0.05}, constructor=STORED)
_ADALOMO = replace(_LOMO, name="adalomo", make_reference=adalomo)

CASES = (
    _LOMO,
    replace(_LOMO, dtype=torch.bfloat16),
    replace(_LOMO, make_reference=lomo_clipped, constructor={**STORED, **CLIPS}, label="clipped"),
    _ADALOMO,
    replace(_ADALOMO, dtype=torch.bfloat16),
    replace(_ADALOMO, make_reference=adalomo_clipped, constructor={**STORED, **CLIPS, **OTHER}, label="clipped"),
)
