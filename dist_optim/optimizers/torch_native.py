"""Optimizers that ship with torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.specs.driver import FLOPS_PER_ELEMENT, ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

_LICENCE = "BSD-3-Clause"
_ELEMENTWISE = frozenset({Trait.ELEMENTWISE})


class FusedDriver(UpstreamDriver):
    """torch's fused kernels: any slice on a GPU, whole tensors on a CPU."""

    def runs_on_slices(self, values: Mapping[str, Any], device: torch.device) -> bool:
        # On a CPU, full SIMD vectors and the elements after the last one round differently (torch 2.13: 3e-8 a step),
        # so that an element's result depends on where its slice ends.
        return device.type != "cpu"


class MuonDriver(UpstreamDriver):
    """Muon steps matrices only: everything else has an optimizer of its own (``OptimizerSpec.rest``)."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        # torch 2.13 refuses vectors even if they are frozen. Positions mean nothing to Muon: leave them out.
        groups = [{**group, "params": [one for one in group["params"] if one.ndim == 2]} for group in param_groups]
        return super().construct(optimizer_class, groups, arguments)

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if len(shape) == 2:
            return ""
        return (
            "torch.optim.Muon orthogonalizes matrices, and steps no tensor that is not 2-D (of weights of nn.Conv1d to "
            "3d the filters are one, where they lie whole on a rank; not under DeepSpeed). Where you list parameters "
            'yourself, pass rest="adamw_torch" for what is no hidden matrix; where groups name an "optim", give them '
            'to another group: {"params": "*", "optim": "adamw_torch"}.'
        )

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        long, short = max(shape), min(shape)
        iteration = 4.0 * short**2 * long + 2.0 * short**3  # three matrix products
        return shape.numel() + values["ns_steps"] * iteration / FLOPS_PER_ELEMENT


_MOMENTUM = Hyperparameter(name="momentum", kind="float", default=0.0, minimum=0.0, meaning="momentum factor")
_L2_PENALTY = "L2 penalty, added to the gradient"
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
        name="adamw_torch_fused",
        load=UpstreamClass("torch.optim", "AdamW"),
        package="torch",
        traits=_ELEMENTWISE,
        hyperparameters=_ADAMW,
        driver=FusedDriver(),
        forced={"fused": True},
        paper="https://arxiv.org/abs/1711.05101",
        summary="AdamW in one fused kernel",
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
            _MOMENTUM,
            Hyperparameter(name="dampening", kind="float", default=0.0, meaning="dampening of the momentum"),
            weight_decay(0.0, meaning=_L2_PENALTY),
            flag("nesterov", False, "Nesterov momentum (needs momentum > 0 and dampening 0)"),
        ),
        paper="https://proceedings.mlr.press/v28/sutskever13.html",
        summary="stochastic gradient descent with momentum",
        licence=_LICENCE,
        state_bytes="0; 4 with momentum (fp32)",
    ),
    OptimizerSpec(
        name="adagrad",
        load=UpstreamClass("torch.optim", "Adagrad"),
        package="torch",
        traits=_ELEMENTWISE,
        hyperparameters=(
            learning_rate(1e-2),
            Hyperparameter(
                name="lr_decay",
                kind="float",
                default=0.0,
                minimum=0.0,
                meaning="the rate after t steps is lr / (1 + t lr_decay)",
            ),
            weight_decay(0.0, meaning=_L2_PENALTY),
            Hyperparameter(
                name="initial_accumulator_value",
                kind="float",
                default=0.0,
                minimum=0.0,
                scope=Scope.CONSTRUCTOR,
                meaning="start of the sum of squared gradients",
            ),
            epsilon(1e-10),
        ),
        paper="https://jmlr.org/papers/v12/duchi11a.html",
        summary="gradients divided by the root of the sum of all their squares so far",
        licence=_LICENCE,
        state_bytes="4 (fp32), 2 (bf16)",
    ),
    OptimizerSpec(
        name="rmsprop",
        load=UpstreamClass("torch.optim", "RMSprop"),
        package="torch",
        traits=_ELEMENTWISE,
        hyperparameters=(
            learning_rate(1e-2),
            Hyperparameter(
                name="alpha",
                kind="float",
                default=0.99,
                minimum=0.0,
                maximum=1.0,
                maximum_open=True,
                meaning="decay rate of the running average of squared gradients",
            ),
            epsilon(1e-8),
            weight_decay(0.0, meaning=_L2_PENALTY),
            _MOMENTUM,
            flag("centered", False, "divide by the standard deviation of the gradient, not by its root mean square"),
        ),
        paper="https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf",
        summary="gradients divided by the root of a running average of their squares",
        licence=_LICENCE,
        state_bytes="4; 4 more with momentum, 4 more when centered (fp32)",
    ),
    OptimizerSpec(
        name="muon",
        load=UpstreamClass("torch.optim", "Muon"),
        package="torch",
        traits=frozenset({Trait.WHOLE_TENSOR, Trait.HIDDEN_MATRICES}),
        rest="adamw_torch",
        hyperparameters=(
            learning_rate(),
            weight_decay(0.1),
            Hyperparameter(
                name="momentum",
                kind="float",
                default=0.95,
                minimum=0.0,
                maximum=1.0,
                meaning="decay rate of the running average of the gradient",
            ),
            flag("nesterov", True, "Nesterov momentum"),
            Hyperparameter(
                name="ns_coefficients",
                kind="floats",
                length=3,
                default=(3.4445, -4.775, 2.0315),
                meaning="coefficients of the Newton-Schulz iteration",
            ),
            epsilon(1e-7),
            Hyperparameter(
                name="ns_steps",
                kind="int",
                default=5,
                minimum=1,
                maximum=99,
                meaning="Newton-Schulz iterations in a step",
            ),
            Hyperparameter(
                name="adjust_lr_fn",
                kind="str",
                default=None,
                optional=True,
                choices=("original", "match_rms_adamw"),
                meaning="how the rate follows the shape of the matrix; None is original, match_rms_adamw lets the "
                "learning rates of AdamW be used",
            ),
        ),
        driver=MuonDriver(),
        paper="https://arxiv.org/abs/2502.16982",
        summary="momentum, orthogonalized by Newton-Schulz iterations, for hidden matrices; `adamw_torch` for the rest",
        licence=_LICENCE,
        state_bytes="4 (fp32), 2 (bf16)",
    ),
)
