"""Adafactor: the second moment of a matrix kept as the means of its rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dist_optim.errors import HyperparameterError
from dist_optim.optimizers.common import adafactor_hyperparameters
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass


class AdafactorDriver(UpstreamDriver):
    """Checks in every param group what upstream checks in its constructor's arguments alone, or not at all."""

    takes_groups_later = True

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
        hyperparameters=adafactor_hyperparameters(None),
        driver=AdafactorDriver(),
        paper="https://arxiv.org/abs/1804.04235",
        summary="Adam with a second moment factored into rows and columns, and clipped updates",
        licence="Apache-2.0",
        state_bytes="4 (m + n) / mn for an m x n matrix, 4 for vectors; 4 more with beta1 (fp32, also for bf16)",
    ),
)
