"""Adafactor: the second moment of a matrix kept as the means of its rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dist_optim.errors import HyperparameterError
from dist_optim.hyperparameters import Hyperparameter
from dist_optim.optimizers.common import flag, weight_decay
from dist_optim.registry import OptimizerSpec, Trait, UpstreamClass
from dist_optim.upstream import ParamGroup, UpstreamDriver


class AdafactorDriver(UpstreamDriver):
    """Checks in every param group what upstream checks in its constructor's arguments alone, or not at all."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        for group in param_groups:
            _refuse_clashes({**arguments, **group})
        return super().construct(optimizer_class, param_groups, arguments)


def _refuse_clashes(values: Mapping[str, Any]) -> None:
    """transformers 5.23 sees a clash only between constructor arguments; a missing lr fails in the middle of step 1."""
    if values["relative_step"] and values["lr"] is not None:
        raise HyperparameterError(
            f"adafactor: lr={values['lr']:g} and relative_step=True exclude each other: a relative step is computed "
            "from the number of steps. Leave lr out, or set relative_step=False."
        )
    if not values["relative_step"] and values["lr"] is None:
        raise HyperparameterError(
            "adafactor needs lr: with relative_step=False (the default here, as in transformers' Trainer) there is no "
            "other learning rate. Pass lr, or relative_step=True."
        )
    if values["warmup_init"] and not values["relative_step"]:
        raise HyperparameterError(
            "adafactor: warmup_init=True is the warm-up of relative steps, but relative_step is False. Set "
            "relative_step=True and leave lr out, or give the warm-up to the learning rate's schedule."
        )


SPECS = (
    OptimizerSpec(
        name="adafactor",
        load=UpstreamClass("transformers.optimization", "Adafactor"),
        package="transformers",
        traits=frozenset({Trait.WHOLE_TENSOR}),
        hyperparameters=(
            Hyperparameter(
                name="lr",
                kind="float",
                default=None,
                minimum=0.0,
                optional=True,
                meaning="learning rate; None with relative_step=True",
            ),
            Hyperparameter(
                name="eps",
                kind="floats",
                default=(1e-30, 1e-3),
                minimum=0.0,
                meaning="added to the squared gradient; least scale of a parameter with scale_parameter",
            ),
            Hyperparameter(
                name="clip_threshold",
                kind="float",
                default=1.0,
                minimum=0.0,
                minimum_open=True,
                meaning="largest root mean square of a tensor's update before the learning rate",
            ),
            Hyperparameter(
                name="decay_rate",
                kind="float",
                default=-0.8,
                maximum=0.0,
                meaning="the second moment decays by 1 - t ** decay_rate at step t",
            ),
            Hyperparameter(
                name="beta1",
                kind="float",
                default=None,
                minimum=0.0,
                maximum=1.0,
                maximum_open=True,
                optional=True,
                meaning="decay rate of a running average of the update; None keeps none",
            ),
            weight_decay(0.0),
            flag("scale_parameter", False, "scale the rate of a tensor by its root mean square"),
            flag("relative_step", False, "compute the rate from the number of steps, in place of lr"),
            flag("warmup_init", False, "let relative steps grow from 1e-6"),
        ),
        driver=AdafactorDriver(),
        paper="https://arxiv.org/abs/1804.04235",
        summary="Adam with a second moment factored into rows and columns, and clipped updates",
        licence="Apache-2.0",
        state_bytes="4 (m + n) / mn for an m x n matrix, 4 for vectors; 4 more with beta1 (fp32, also for bf16)",
    ),
)
