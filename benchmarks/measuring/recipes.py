"""The optimizers that are measured: upstream's class, ours by name, and the hyperparameters that both get."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["RECIPES", "Recipe", "in_training"]

REFRESH_EVERY = 5
"""Steps from one projection of GaLore's to the next, so that a short run has several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One optimizer. ``values`` go to both sides under upstream's names, ``matrix`` to low-rank groups alone."""

    name: str
    upstream: str
    """``module:class``."""
    constructor: dict[str, Any] = field(default_factory=dict)
    """What upstream takes beside its groups, where ours has another default or chooses by itself."""
    values: dict[str, Any] = field(default_factory=dict)
    matrix: dict[str, Any] = field(default_factory=dict)
    refresh_every: int = 0
    """Every so many steps one is dearer, and is measured apart; 0 where all steps are alike."""

    def upstream_class(self) -> type[Optimizer]:
        module, _, name = self.upstream.partition(":")
        loaded: type[Optimizer] = getattr(importlib.import_module(module), name)
        return loaded

    def upstream_groups(self, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Upstream's param groups: matrices in a low-rank one where there is such a thing."""
        if not self.matrix:
            return [{"params": list(parameters), **self.values}]
        wanted: tuple[tuple[list[Tensor], dict[str, Any]], ...] = (
            ([p for p in parameters if p.ndim != 2], {}),
            ([p for p in parameters if p.ndim == 2], self.matrix),
        )
        return [{"params": params, **self.values, **more} for params, more in wanted if params]

    def upstream_optimizer(self, parameters: Sequence[Tensor]) -> Optimizer:
        return in_training(self.upstream_class()(self.upstream_groups(parameters), **self.constructor))

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of ``dist_optim.build_optimizer``, and ``params`` of DeepSpeed's JSON."""
        return {**self.values, **self.matrix, **({"target_modules": "all-linear"} if self.matrix else {})}


def in_training(optimizer: Optimizer) -> Optimizer:
    """Some optimizers (schedule-free ones) have to be told that training begins."""
    if callable(train := getattr(optimizer, "train", None)):
        train()
    return optimizer


_DECAY = {"lr": 1e-3, "weight_decay": 0.01}
_LOW_RANK = {"rank": 128, "scale": 0.25, "proj_type": "std"}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="galore_adamw",
            upstream="galore_torch:GaLoreAdamW",
            constructor={"no_deprecation_warning": True},
            values=_DECAY,
            matrix={**_LOW_RANK, "update_proj_gap": REFRESH_EVERY},
            refresh_every=REFRESH_EVERY,
        ),
        Recipe(
            name="apollo_adamw",
            upstream="apollo_torch:APOLLOAdamW",
            values={**_DECAY, "eps": 1e-8},
            matrix={**_LOW_RANK, "scale": 1.0, "update_proj_gap": 200, "proj": "random", "scale_type": "channel"},
        ),
        Recipe(
            name="adafactor",
            upstream="transformers.optimization:Adafactor",
            constructor={"scale_parameter": False, "relative_step": False},
            values=_DECAY,
        ),
        Recipe(
            name="stable_adamw",
            upstream="optimi:StableAdamW",
            constructor={"lr": 1e-3, "betas": (0.9, 0.999), "triton": False},  # from groups it reads other keys
            values={**_DECAY, "eps": 1e-8},
        ),
        Recipe(name="adamw_torch", upstream="torch.optim:AdamW", values=_DECAY),
        Recipe(name="schedule_free_adamw", upstream="schedulefree:AdamWScheduleFree", values=_DECAY),
        Recipe(name="muon", upstream="torch.optim:Muon", values=_DECAY),
        Recipe(name="grokadamw", upstream="grokadamw:GrokAdamW", values=_DECAY),
    )
}
