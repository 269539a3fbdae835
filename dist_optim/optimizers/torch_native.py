"""Optimizers that ship with torch."""

from __future__ import annotations

from dist_optim.hyperparameters import Hyperparameter
from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.registry import OptimizerSpec, Trait, UpstreamClass

_LICENCE = "BSD-3-Clause"
_ELEMENTWISE = frozenset({Trait.ELEMENTWISE})

_ADAMW = (
    learning_rate(),
    betas(),
    epsilon(),
    weight_decay(0.0),
    flag("amsgrad", False, "keep the maximum of the second moment"),
)

SPECS = (
    OptimizerSpec(
        name="adamw_torch",
        load=UpstreamClass("torch.optim", "AdamW"),
        package="torch",
        traits=_ELEMENTWISE,
        hyperparameters=_ADAMW,
        paper="https://arxiv.org/abs/1711.05101",
        summary="AdamW",
        licence=_LICENCE,
        state_bytes="8 (fp32), 4 (bf16)",
    ),
    OptimizerSpec(
        name="sgd",
        load=UpstreamClass("torch.optim", "SGD"),
        package="torch",
        traits=_ELEMENTWISE,
        hyperparameters=(
            learning_rate(),
            Hyperparameter(name="momentum", kind="float", default=0.0, minimum=0.0, meaning="momentum factor"),
            Hyperparameter(name="dampening", kind="float", default=0.0, meaning="dampening of the momentum"),
            weight_decay(0.0, meaning="L2 penalty, added to the gradient"),
            flag("nesterov", False, "Nesterov momentum (needs momentum > 0 and dampening 0)"),
        ),
        paper="https://proceedings.mlr.press/v28/sutskever13.html",
        summary="stochastic gradient descent with momentum",
        licence=_LICENCE,
        state_bytes="0; 4 with momentum (fp32)",
    ),
)
