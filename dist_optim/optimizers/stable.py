"""StableAdamW: AdamW whose rate for a tensor falls when its update is larger than its second moment foresees."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, limit, weight_decay
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass


class StableAdamWDriver(UpstreamDriver):
    """Takes the decisions that upstream takes from a list that is still empty, or anew in every group."""

    takes_groups_later = True

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        chosen = dict(arguments)
        if chosen["triton"] is None:
            # torch-optimi 0.3.3 asks whether Triton suits the parameters before it has listed any, and takes the
            # answer for none, which is yes: on a CPU the first step fails. The answer for all of them is upstream's.
            suits = importlib.import_module("optimi.utils")._default_to_triton
            chosen["triton"] = suits([parameter for group in param_groups for parameter in group["params"]])
        # Upstream settles None in a group's first step with a half-precision gradient: an instance that owns nothing of
        # the group would keep None, and hand it on to a state dict. True is the same in full precision.
        chosen["kahan_sum"] = chosen["kahan_sum"] is not False
        return super().construct(optimizer_class, param_groups, chosen)

    def keeps_precision(self, values: Mapping[str, Any]) -> bool:
        return values["kahan_sum"] is not False

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if values["triton"] and device.type == "cpu":
            return "triton=True needs parameters on a GPU. Leave triton out, or move the model to its device first."
        return ""


SPECS = (
    OptimizerSpec(
        name="stable_adamw",
        load=UpstreamClass("optimi", "StableAdamW"),
        package="torch-optimi",
        extra="stable",
        traits=frozenset({Trait.WHOLE_TENSOR}),
        hyperparameters=(
            learning_rate(None),
            # Upstream copies betas to group["beta1"] and group["beta2"], and reads them from there.
            replace(betas(), scope=Scope.CONSTRUCTOR),
            epsilon(),
            weight_decay(0.0),
            flag(
                "decouple_lr",
                False,
                "weight decay by (lr / max_lr) * weight_decay, whatever the learning rate",
                scope=Scope.CONSTRUCTOR,
            ),
            limit("max_lr", "largest learning rate of the schedule, for decouple_lr; None takes lr"),
            Hyperparameter(
                name="kahan_sum",
                kind="bool",
                default=None,
                optional=True,
                scope=Scope.CONSTRUCTOR,
                meaning="compensate the rounding of half-precision weights; None does so wherever there are such",
            ),
            Hyperparameter(
                name="triton",
                kind="bool",
                default=None,
                optional=True,
                scope=Scope.CONSTRUCTOR,
                meaning="Triton kernels, whose sums are not bitwise reproducible; None takes them where all parameters "
                "are on GPUs that support them",
            ),
        ),
        driver=StableAdamWDriver(),
        paper="https://arxiv.org/abs/2304.13013",
        summary="AdamW with the update clipping of Adafactor, and compensated half-precision weights",
        licence="MIT",
        state_bytes="8 (fp32), 6 (bf16, compensated)",
    ),
)
