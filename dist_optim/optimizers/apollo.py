"""APOLLO: Adam's scaling of each channel, estimated in a low-rank space that random vectors span.

apollo-torch is licensed CC BY-NC 4.0, for non-commercial use: it is imported, never copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.optimizers.low_rank import LowRankDriver, low_rank_hyperparameters
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

__all__ = ["SPECS"]


class ApolloDriver(LowRankDriver):
    """Random and SVD projectors of apollo-torch; both kinds are told apart by the seed that only the random one has."""

    def projector_class(self, fields: Mapping[str, Any]) -> type:
        if "seed" in fields:
            return UpstreamClass("apollo_torch.random_projector", "GradientProjector")()
        return UpstreamClass("apollo_torch.svd_projector", "GaLoreProjector")()

    def state_classes(self) -> tuple[type, ...]:
        return self.projector_class({"seed": 0}), self.projector_class({})

    def refresh_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        return super().refresh_cost(shape, values) if values.get("proj") == "svd" else 0.0

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        reason = super().why_refused(shape, dtype, device, values)
        if reason or "rank" not in values:
            return reason
        if values["scale_type"] == "channel" and not _factors_fit(shape, values):
            # apollo-torch 1.0.3 takes norms over the side that proj_type='std' projects, whatever proj_type says.
            return (
                f"proj_type={values['proj_type']!r} with scale_type='channel' fails in apollo-torch for a "
                f"{shape[0]} x {shape[1]} matrix at rank {values['rank']}: the gradient would be multiplied by factors "
                "of the other side. Use proj_type='std', or scale_type='tensor'."
            )
        return ""


def _factors_fit(shape: torch.Size, values: Mapping[str, Any]) -> bool:
    """Whether upstream gets one factor a channel of the longer side (or a single factor, which also multiplies)."""
    rows, columns = shape
    is_tall = rows >= columns
    keeps_rows = {"std": is_tall, "reverse_std": not is_tall, "right": True, "left": False}[values["proj_type"]]
    rank = values["rank"] if values["proj"] == "random" else min(values["rank"], rows, columns)
    return keeps_rows == is_tall or rank in (max(rows, columns), 1)


_PROJ = Hyperparameter(
    name="proj",
    kind="str",
    default="random",
    choices=("random", "svd"),
    scope=Scope.MATRIX,
    meaning="random vectors, or leading singular vectors of the gradient",
)
_SCALE_TYPE = Hyperparameter(
    name="scale_type",
    kind="str",
    default="channel",
    choices=("channel", "tensor"),
    scope=Scope.MATRIX,
    meaning="one factor for each row or column, or one for the whole matrix",
)
# The Trainer passes its eps (1e-8) to the low-rank matrices alone; the other tensors keep upstream's.
_EPS = replace(epsilon(1e-6), meaning="added to the denominator; when unset, 1e-8 for low-rank matrices")

_PLAIN = (
    learning_rate(),
    betas(),
    _EPS,
    weight_decay(0.0),
    flag("correct_bias", True, "correct the bias of the running averages"),
    flag("scale_front", False, "multiply by sqrt(scale) before the limiter on growing norms", Scope.CONSTRUCTOR),
    flag("disable_nl", False, "leave out the limiter on growing norms", Scope.CONSTRUCTOR),
)

_APOLLO = OptimizerSpec(
    name="apollo_adamw",
    load=UpstreamClass("apollo_torch", "APOLLOAdamW"),
    package="apollo-torch",
    extra="apollo",
    traits=frozenset({Trait.ELEMENTWISE, Trait.LOW_RANK, Trait.WHOLE_TENSOR, Trait.POSITION_DEPENDENT}),
    hyperparameters=(*_PLAIN, *low_rank_hyperparameters(scale=1.0), _PROJ, _SCALE_TYPE),
    matrix_defaults={"eps": 1e-8},
    driver=ApolloDriver(),
    paper="https://arxiv.org/abs/2412.05270",
    summary="SGD-like memory: Adam's scaling of each channel, estimated in a random low-rank space",
    licence="CC BY-NC 4.0 (non-commercial use only)",
    state_bytes="for an m x n matrix, m >= n, rank r: 4 (2mr + rn) / mn; other tensors 8 (fp32)",
)
SPECS = (
    _APOLLO,
    replace(
        _APOLLO,
        name="apollo_mini",
        hyperparameters=(
            *_PLAIN,
            *low_rank_hyperparameters(rank=1, scale=128.0),
            _PROJ,
            replace(_SCALE_TYPE, default="tensor"),
        ),
        summary="APOLLO at rank 1 with one scaling factor for each matrix",
        state_bytes="for an m x n matrix, m >= n: 4 (2m + n) / mn; other tensors 8 (fp32)",
    ),
)
