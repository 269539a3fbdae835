"""Layerwise GaLore and APOLLO: transformers' names for updates inside backward, one parameter at a time.

They are the plain algorithms, and end where those end. transformers builds an optimizer for each parameter: the
schedule, weight decay, clipping and saved state are lost there, and every APOLLO parameter gets the same seed. Here one
optimizer is stepped by ``dist_optim.inside_backward.handle``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.optimizers import apollo, galore
from dist_optim.optimizers.common import CLIP_GRAD_NORM
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["SPECS"]


class _ClippingDriver(UpstreamDriver):
    """Put before a family's driver: gradients are clipped by the norm of all of them, which upstream cannot know."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        own = {key: value for key, value in arguments.items() if key != CLIP_GRAD_NORM.name}
        optimizer: Any = super().construct(optimizer_class, param_groups, own)
        optimizer.clip_grad_norm, optimizer.clip_coefficient = arguments[CLIP_GRAD_NORM.name], None
        return optimizer

    def needs_total_norm(self, values: Mapping[str, Any]) -> bool:
        return values[CLIP_GRAD_NORM.name] is not None

    def take_total_norm(self, optimizer: Any, total: Tensor) -> None:
        optimizer.clip_coefficient = torch.clamp(optimizer.clip_grad_norm / (total + 1e-6), max=1.0)

    def step(self, optimizer: Any, parameters: list[Tensor]) -> None:
        if optimizer.clip_coefficient is not None:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(optimizer.clip_coefficient)
        super().step(optimizer, parameters)


def _layerwise(spec: OptimizerSpec) -> OptimizerSpec:
    own = type(spec.driver)
    return replace(
        spec,
        name=f"{spec.name}_layerwise",
        traits=spec.traits | {Trait.FUSED_BACKWARD},
        hyperparameters=(*(spec.hyperparameters or ()), CLIP_GRAD_NORM),
        driver=type(f"Layerwise{own.__name__}", (_ClippingDriver, own), {})(),
        summary=f"{spec.summary}; stepped inside backward, one parameter at a time",
        instead=spec.name,
    )


SPECS = tuple(_layerwise(spec) for spec in (*galore.SPECS, *apollo.SPECS) if spec.name != "apollo_mini")
