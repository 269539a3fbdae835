"""LOMO and AdaLomo, which update parameters inside backward and keep no gradients."""

from __future__ import annotations

from typing import Any

from dist_optim.hyperparameters import Hyperparameter, Scope
from dist_optim.optimizers.common import factored_moment, learning_rate, weight_decay
from dist_optim.registry import OptimizerSpec, Trait, UpstreamClass

__all__ = ["SPECS"]


def _refusal(instead: str) -> str:
    return (
        "it updates parameters inside backward, from gradients that are not reduced over ranks yet; as upstream does "
        f"it, replicas part ways without an error. Stepping inside backward is not served. Use {instead}."
    )


def _limit(name: str, meaning: str) -> Hyperparameter:
    return Hyperparameter(
        name=name,
        kind="float",
        default=None,
        minimum=0.0,
        minimum_open=True,
        optional=True,
        scope=Scope.CONSTRUCTOR,
        meaning=meaning,
    )


_CLIPS = (
    _limit("clip_grad_norm", "largest norm of all gradients together; costs a second backward pass"),
    _limit("clip_grad_value", "largest absolute value of a gradient's element"),
)
_COMMON: dict[str, Any] = {"package": "lomo-optim", "extra": "lomo", "licence": "MIT"}

SPECS = (
    OptimizerSpec(
        name="lomo",
        load=UpstreamClass("lomo_optim", "Lomo"),
        traits=frozenset({Trait.ELEMENTWISE, Trait.FUSED_BACKWARD}),
        hyperparameters=(learning_rate(), *_CLIPS, weight_decay(0.0)),
        paper="https://arxiv.org/abs/2306.09782",
        summary="SGD fused into backward: neither state nor stored gradients",
        state_bytes="0, and no gradients",
        refusal=_refusal("sgd, which has the same trajectory but stores gradients"),
        **_COMMON,
    ),
    OptimizerSpec(
        name="adalomo",
        load=UpstreamClass("lomo_optim", "AdaLomo"),
        traits=frozenset({Trait.WHOLE_TENSOR, Trait.FUSED_BACKWARD}),
        hyperparameters=(
            learning_rate(),
            Hyperparameter(
                name="loss_scale",
                kind="float",
                default=2.0**10,
                minimum=0.0,
                minimum_open=True,
                scope=Scope.CONSTRUCTOR,
                meaning="factor on the loss during backward",
            ),
            *factored_moment(Scope.CONSTRUCTOR),
            *_CLIPS,
            weight_decay(0.0),
        ),
        paper="https://arxiv.org/abs/2310.10195",
        summary="Adafactor-like second moments, fused into backward: no stored gradients",
        state_bytes="4 (m + n) / mn for an m x n matrix, and no gradients",
        refusal=_refusal("adafactor, the nearest in state and update, which stores gradients"),
        **_COMMON,
    ),
)
