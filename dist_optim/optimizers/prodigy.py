"""Prodigy: Adam whose step size follows an estimate of the distance to the solution, over all tensors."""

from __future__ import annotations

import math

from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

SPECS = (
    OptimizerSpec(
        name="prodigy",
        load=UpstreamClass("prodigyopt", "Prodigy"),
        package="prodigyopt",
        extra="prodigy",
        traits=frozenset({Trait.WHOLE_TENSOR, Trait.COUPLED}),
        hyperparameters=(
            learning_rate(1.0),
            betas(),
            Hyperparameter(
                name="beta3",
                kind="float",
                default=None,
                minimum=0.0,
                maximum=1.0,
                optional=True,
                meaning="decay rate of the estimate of the distance; None takes the root of the second of betas",
            ),
            epsilon(),
            weight_decay(0.0),
            flag("decouple", True, "decoupled weight decay"),
            flag("use_bias_correction", False, "correct the bias of Adam's averages"),
            flag("safeguard_warmup", False, "leave the rate out of the estimate's denominator, for a warm-up"),
            Hyperparameter(
                name="d0",
                kind="float",
                default=1e-6,
                minimum=0.0,
                minimum_open=True,
                scope=Scope.CONSTRUCTOR,
                meaning="first estimate of the distance",
            ),
            Hyperparameter(
                name="d_coef", kind="float", default=1.0, minimum=0.0, meaning="factor on the estimate of the distance"
            ),
            Hyperparameter(
                name="growth_rate",
                kind="float",
                default=math.inf,
                minimum=1.0,
                meaning="largest growth of the estimate from one step to the next",
            ),
            Hyperparameter(
                name="slice_p",
                kind="int",
                default=1,
                minimum=1,
                meaning="estimate from every so many elements of a tensor, with less state",
            ),
        ),
        paper="https://arxiv.org/abs/2306.06101",
        summary="AdamW that finds its learning rate, one for all tensors; leave lr at 1",
        licence="MIT",
        state_bytes="16 (fp32), 8 (bf16); 8 with a large slice_p",
    ),
)
