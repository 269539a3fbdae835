"""Optimizers of the package pytorch-optimizer that step each tensor by itself: Lion, Adan, ADOPT, LAMB, CAME, MARS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from dist_optim.errors import HyperparameterError
from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

PACKAGE, EXTRA, LICENCE = "pytorch-optimizer", "pytorch-optimizer", "Apache-2.0"
_WHOLE = frozenset({Trait.WHOLE_TENSOR})


class ClippedDriver(UpstreamDriver):
    """Adan: a bound on the norm of all gradients couples the tensors; there is none by default."""

    def couples(self, values: Mapping[str, Any]) -> bool:
        return bool(values["max_grad_norm"])


class LambDriver(UpstreamDriver):
    """LAMB: its norm of all gradients is taken, and couples the tensors, with ``pre_norm`` alone."""

    def couples(self, values: Mapping[str, Any]) -> bool:
        return bool(values["pre_norm"] and values["max_grad_norm"])


class MarsDriver(UpstreamDriver):
    """MARS: keeps the quotient of its two rates."""

    takes_groups_later = True

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        if arguments["lr"] == 0:
            raise HyperparameterError(
                "mars: lr=0 cannot be built with: upstream divides lr_1d by it. Build with the largest rate, and let a "
                "schedule warm up to it."
            )
        return super().construct(optimizer_class, param_groups, arguments)

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        if values["mars_type"] != "shampoo" or len(shape) < 2:
            return float(shape.numel())
        short = min(shape[0], shape.numel() // max(1, shape[0]))
        return shape.numel() * (1.0 + 5 * short / 4.0)  # five Newton-Schulz iterations


def decoupled(default: bool) -> Hyperparameter:
    """``weight_decouple`` of the package's optimizers."""
    return flag("weight_decouple", default, "decay weights themselves, in place of adding the decay to the gradient")


def three_betas(default: tuple[float, float, float], meaning: str) -> Hyperparameter:
    """``betas`` of methods that keep three averages."""
    return replace(betas(), default=default, length=3, meaning=meaning)


FIXED_DECAY = flag("fixed_decay", False, "decoupled weight decay that the learning rate does not scale")
FOREACH = Hyperparameter(
    name="foreach",
    kind="bool",
    default=None,
    optional=True,
    meaning="one kernel for many tensors; None uses it where tensors are real and gradients dense",
)
MAXIMIZE = flag("maximize", False, "maximize the objective", scope=Scope.CONSTRUCTOR)
AMS_BOUND = flag("ams_bound", False, "keep the maximum of the second moment")


def bound(name: str, default: float, meaning: str) -> Hyperparameter:
    """A number from 0 up that the constructor alone takes."""
    return Hyperparameter(
        name=name, kind="float", default=default, minimum=0.0, scope=Scope.CONSTRUCTOR, meaning=meaning
    )


def whole_number(name: str, default: int, meaning: str, minimum: int = 1, scope: Scope = Scope.GROUP) -> Hyperparameter:
    """A count."""
    return Hyperparameter(name=name, kind="int", default=default, minimum=minimum, scope=scope, meaning=meaning)


SPECS = (
    OptimizerSpec(
        name="lion",
        load=UpstreamClass("pytorch_optimizer", "Lion"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.ELEMENTWISE}),
        hyperparameters=(
            learning_rate(1e-4),
            replace(betas(0.9, 0.99), meaning="interpolation of the update; decay rate of the running average"),
            weight_decay(0.0),
            decoupled(True),
            FIXED_DECAY,
            FOREACH,
            MAXIMIZE,
        ),
        paper="https://arxiv.org/abs/2302.06675",
        summary="the sign of an interpolation between gradient and momentum",
        licence=LICENCE,
        state_bytes="4 (fp32), 2 (bf16)",
    ),
    OptimizerSpec(
        name="adan",
        load=UpstreamClass("pytorch_optimizer", "Adan"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.ELEMENTWISE, Trait.COUPLED}),
        hyperparameters=(
            learning_rate(),
            three_betas((0.98, 0.92, 0.99), "decay rates of gradients, of their differences, and of squares of both"),
            weight_decay(0.0),
            decoupled(False),
            bound("max_grad_norm", 0.0, "largest norm of all gradients together; 0 for none"),
            FOREACH,
            epsilon(),
            MAXIMIZE,
        ),
        driver=ClippedDriver(),
        paper="https://arxiv.org/abs/2208.06677",
        summary="Adam with Nesterov momentum from differences of gradients",
        licence=LICENCE,
        state_bytes="16 (fp32), 8 (bf16)",
    ),
    OptimizerSpec(
        name="adopt",
        load=UpstreamClass("pytorch_optimizer", "ADOPT"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.ELEMENTWISE}),
        hyperparameters=(
            learning_rate(),
            betas(0.9, 0.9999),
            Hyperparameter(
                name="clip_lambda",
                kind="any",
                default=None,
                is_inherited=True,
                scope=Scope.CONSTRUCTOR,
                meaning="a function from the step to the largest normalized gradient; step ** 0.25 where none is given",
            ),
            weight_decay(0.0),
            decoupled(False),
            FIXED_DECAY,
            FOREACH,
            epsilon(1e-6),
            MAXIMIZE,
        ),
        paper="https://arxiv.org/abs/2411.02853",
        summary="Adam that normalizes by the second moment before the current gradient, and converges with any beta2",
        licence=LICENCE,
        state_bytes="8 (fp32), 4 (bf16)",
    ),
    OptimizerSpec(
        name="lamb",
        load=UpstreamClass("pytorch_optimizer", "Lamb"),
        package=PACKAGE,
        extra=EXTRA,
        traits=_WHOLE | {Trait.COUPLED},
        hyperparameters=(
            learning_rate(),
            betas(),
            weight_decay(0.0),
            decoupled(True),
            FIXED_DECAY,
            flag("rectify", False, "rectify the variance of the first steps, as RAdam does"),
            flag("degenerated_to_sgd", False, "step as SGD until rectified steps begin", scope=Scope.CONSTRUCTOR),
            whole_number(
                "n_sma_threshold", 5, "averaged steps from which on steps are rectified", 0, Scope.CONSTRUCTOR
            ),
            flag("grad_averaging", True, "scale new gradients by 1 - beta1"),
            bound("max_grad_norm", 1.0, "with pre_norm, largest norm of all gradients together; 0 for none"),
            flag("adam", False, "a trust ratio of 1 for all tensors"),
            flag("pre_norm", False, "clip the norm of all gradients together", scope=Scope.CONSTRUCTOR),
            epsilon(1e-6),
            FOREACH,
            MAXIMIZE,
        ),
        driver=LambDriver(),
        paper="https://arxiv.org/abs/1904.00962",
        summary="Adam whose step for a tensor is scaled to the norm of its weights, for large batches",
        licence=LICENCE,
        state_bytes="8 (fp32), 4 (bf16)",
    ),
    OptimizerSpec(
        name="came",
        load=UpstreamClass("pytorch_optimizer", "CAME"),
        package=PACKAGE,
        extra=EXTRA,
        traits=_WHOLE,
        hyperparameters=(
            learning_rate(2e-4),
            three_betas((0.9, 0.999, 0.9999), "decay rates of updates, of squared gradients, and of squared residuals"),
            weight_decay(0.0),
            decoupled(True),
            FIXED_DECAY,
            bound("clip_threshold", 1.0, "largest root mean square of a tensor's update"),
            AMS_BOUND,
            bound("eps1", 1e-30, "added to squared gradients"),
            bound("eps2", 1e-16, "added to squared residuals"),
            MAXIMIZE,
            FOREACH,
        ),
        paper="https://arxiv.org/abs/2307.02047",
        summary="Adafactor's factored second moment, and momentum that is trusted as far as it agrees with updates",
        licence=LICENCE,
        state_bytes="4 (fp32), 2 (bf16); rows and columns besides",
    ),
    OptimizerSpec(
        name="mars",
        load=UpstreamClass("pytorch_optimizer", "MARS"),
        package=PACKAGE,
        extra=EXTRA,
        traits=_WHOLE,
        hyperparameters=(
            learning_rate(3e-3),
            betas(0.95, 0.99),
            Hyperparameter(
                name="gamma", kind="float", default=0.025, minimum=0.0, meaning="weight of the gradient's correction"
            ),
            Hyperparameter(
                name="mars_type",
                kind="str",
                default="adamw",
                choices=("adamw", "lion", "shampoo"),
                meaning="what is done with the corrected gradient",
            ),
            flag("optimize_1d", False, "treat vectors as matrices are"),
            replace(
                learning_rate(3e-3),
                name="lr_1d",
                scope=Scope.CONSTRUCTOR,
                meaning="rate of vectors, while lr is as given",
            ),
            replace(betas(0.9, 0.95), name="betas_1d", meaning="decay rates for vectors"),
            weight_decay(0.0),
            replace(weight_decay(0.1), name="weight_decay_1d", meaning="weight decay of vectors"),
            decoupled(True),
            FIXED_DECAY,
            AMS_BOUND,
            flag("cautious", False, "leave out updates against the sign of the gradient"),
            epsilon(),
            MAXIMIZE,
            FOREACH,
        ),
        driver=MarsDriver(),
        paper="https://arxiv.org/abs/2411.10438",
        summary="AdamW, Lion or Shampoo on gradients whose variance is reduced by those of the step before",
        licence=LICENCE,
        state_bytes="12 (fp32), 6 (bf16)",
    ),
)
