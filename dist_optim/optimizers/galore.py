"""GaLore: Adam in a low-rank subspace of each matrix's gradient, found anew by an SVD every few hundred steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.hyperparameters import Hyperparameter, Scope
from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.registry import OptimizerSpec, Trait, UpstreamClass
from dist_optim.upstream import ParamGroup, UpstreamDriver

PROJECTION_TYPES = ("std", "reverse_std", "left", "right", "full")

# Seconds of LAPACK's thin SVD relative to an elementwise pass, fitted to one CPU thread: about 6 L k^2 + 20 k^3 flops
# for sides L >= k, three times as long when the matrix is wide; an elementwise AdamW pass does about 20 flops' worth.
_FLOPS_PER_ELEMENT = 20.0
_WIDE_PENALTY = 3.0


class GaLoreDriver(UpstreamDriver):
    """Turns the projector object in the state into tensors, and keeps its basis from holding the whole ``Vh``."""

    projector_module = "galore_torch.galore_projector"
    projector_class = "GaLoreProjector"

    def step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        super().step(optimizer, parameters)
        for parameter in parameters:
            projector = self.read_state(optimizer, parameter).get("projector")
            if projector is not None:
                projector.ortho_matrix = _compact(projector.ortho_matrix)

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if (
            "rank" in values
            and values["proj_type"] == "reverse_std"
            and shape[0] < shape[1]
            and values["rank"] >= shape[0]
        ):
            # galore-torch 1.0 takes the side for the way back from the projected shape, and multiplies misfits.
            return (
                f"proj_type='reverse_std' cannot project a {shape[0]} x {shape[1]} matrix to rank {values['rank']}: "
                f"upstream fails unless rank < {shape[0]}. Lower rank, or use proj_type='std'."
            )
        return ""

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        if "rank" not in values or len(shape) != 2:
            return float(shape.numel())
        long, short = max(shape), min(shape)
        projections = 4.0 * shape.numel() * min(values["rank"], short)
        svd = (6.0 * long * short**2 + 20.0 * short**3) * (_WIDE_PENALTY if shape[0] < shape[1] else 1.0)
        return shape.numel() + (projections + svd / values["update_proj_gap"]) / _FLOPS_PER_ELEMENT

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        encoded = {key: value for key, value in state.items() if key != "projector"}
        projector = state.get("projector")
        for key, value in vars(projector).items() if projector is not None else ():
            if key == "ortho_matrix" and isinstance(value, list):
                encoded |= {f"projector.{key}.{side}": part for side, part in enumerate(value)}
            else:
                encoded[f"projector.{key}"] = value
        return super().encode_state(encoded)

    def decode_state(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        state = {key: value for key, value in encoded.items() if not key.startswith("projector.")}
        fields = {key.removeprefix("projector."): v for key, v in encoded.items() if key.startswith("projector.")}
        if fields:
            if "ortho_matrix.0" in fields:
                fields["ortho_matrix"] = [fields.pop("ortho_matrix.0"), fields.pop("ortho_matrix.1")]
            projector_class = UpstreamClass(self.projector_module, self.projector_class)()
            projector = projector_class.__new__(projector_class)
            vars(projector).update(fields)
            state["projector"] = projector
        return state


class GaLoreAdamWDriver(GaLoreDriver):
    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        # galore-torch 1.0 warns that its AdamW is deprecated in favour of torch's, which has no projection.
        return super().construct(optimizer_class, param_groups, {**arguments, "no_deprecation_warning": True})


def _compact(basis: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The basis on storage of its own.

    galore-torch 1.0 keeps a view of the first rows of ``Vh`` (or columns of ``U``), and with it all of ``Vh``: 4.5
    bytes an element instead of 0.75 for a 2048 x 2048 matrix at rank 128.
    """
    if isinstance(basis, list):
        return [part.clone() if _is_part(part) else part for part in basis]
    return basis.clone() if _is_part(basis) else basis


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def low_rank_hyperparameters(scale: float) -> tuple[Hyperparameter, ...]:
    """What GaLore and APOLLO read from the param groups of low-rank matrices; defaults as the Trainer sets them."""
    return (
        Hyperparameter(
            name="rank", kind="int", default=128, minimum=1, scope=Scope.MATRIX, meaning="dimension of the subspace"
        ),
        Hyperparameter(
            name="update_proj_gap",
            kind="int",
            default=200,
            minimum=1,
            scope=Scope.MATRIX,
            meaning="steps between two computations of the projection",
        ),
        Hyperparameter(
            name="scale",
            kind="float",
            default=scale,
            minimum=0.0,
            minimum_open=True,
            scope=Scope.MATRIX,
            meaning="factor on the update of low-rank matrices",
        ),
        Hyperparameter(
            name="proj_type",
            kind="str",
            default="std",
            choices=PROJECTION_TYPES,
            scope=Scope.MATRIX,
            meaning="which side is projected; std takes the shorter one",
        ),
    )


_CORRECT_BIAS = flag("correct_bias", True, "correct the bias of the running averages")

SPECS = (
    OptimizerSpec(
        name="galore_adamw",
        load=UpstreamClass("galore_torch", "GaLoreAdamW"),
        package="galore-torch",
        extra="galore",
        traits=frozenset({Trait.ELEMENTWISE, Trait.LOW_RANK, Trait.WHOLE_TENSOR}),
        hyperparameters=(learning_rate(), betas(), epsilon(1e-6), weight_decay(0.0), _CORRECT_BIAS)
        + low_rank_hyperparameters(scale=0.25),
        driver=GaLoreAdamWDriver(),
        paper="https://arxiv.org/abs/2403.03507",
        summary="AdamW on gradients projected to their leading singular vectors",
        licence="Apache-2.0",
        state_bytes="for an m x n matrix, m >= n, rank r: 4 (2mr + rn) / mn; other tensors 8 (fp32)",
    ),
)
