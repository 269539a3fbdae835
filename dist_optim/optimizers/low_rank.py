"""What GaLore and APOLLO share: their hyperparameters, and the projector objects that they keep in their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.specs.driver import FLOPS_PER_ELEMENT, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope

__all__ = ["ONE_SIDED", "LowRankDriver", "low_rank_hyperparameters", "svd_cost"]

ONE_SIDED = ("std", "reverse_std", "left", "right")

# Seconds of LAPACK's thin SVD relative to an elementwise pass, fitted to one CPU thread: about 6 L k^2 + 20 k^3 flops
# for sides L >= k, three times as long when the matrix is wide; an elementwise AdamW pass does about 20 flops' worth.
_WIDE_PENALTY = 3.0
_PREFIX = "projector."


class LowRankDriver(UpstreamDriver):
    """Turns the projector object in the state into tensors, and keeps its basis from holding a whole SVD factor."""

    takes_groups_later = False

    def step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        super().step(optimizer, parameters)
        self.compact_projectors(optimizer, parameters)

    def compact_projectors(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Give each basis storage of its own, without the rest of the SVD factor that it was cut from."""
        for parameter in parameters:
            projector = self.read_state(optimizer, parameter).get("projector")
            if projector is not None:
                projector.ortho_matrix = _compact(projector.ortho_matrix)

    def projector_class(self, fields: Mapping[str, Any]) -> type:
        """The upstream class of a projector with these attributes."""
        raise NotImplementedError

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if "rank" in values and len(shape) != 2:
            # galore-torch 1.0 and apollo-torch 1.0.3 fail inside step() with an IndexError or a shape mismatch.
            return (
                f"a low-rank projection takes matrices, but this parameter has {len(shape)} dimensions "
                f"{tuple(shape)}. Put it in a param group without `rank`, or select linear layers with target_modules."
            )
        return ""

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        if "rank" not in values:
            return float(shape.numel())
        projections = 4.0 * shape.numel() * min(values["rank"], *shape)
        return shape.numel() + projections / FLOPS_PER_ELEMENT + self.refresh_cost(shape, values)

    def refresh_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        """Cost of finding the projection, shared out over the steps between two refreshes."""
        return svd_cost(shape) / values["update_proj_gap"] if "rank" in values else 0.0

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        encoded = {key: value for key, value in state.items() if key != "projector"}
        projector = state.get("projector")
        for key, value in vars(projector).items() if projector is not None else ():
            if key == "ortho_matrix" and isinstance(value, list):
                encoded |= {f"{_PREFIX}{key}.{side}": part for side, part in enumerate(value)}
            else:
                encoded[_PREFIX + key] = value
        return super().encode_state(encoded)

    def decode_state(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        state = {key: value for key, value in encoded.items() if not key.startswith(_PREFIX)}
        fields = {key.removeprefix(_PREFIX): v for key, v in encoded.items() if key.startswith(_PREFIX)}
        if fields:
            if "ortho_matrix.0" in fields:
                fields["ortho_matrix"] = [fields.pop("ortho_matrix.0"), fields.pop("ortho_matrix.1")]
            projector: Any = object.__new__(self.projector_class(fields))
            vars(projector).update(fields)
            state["projector"] = projector
        return state


def svd_cost(shape: torch.Size) -> float:
    """Cost of a thin SVD, in units of an elementwise pass over one element."""
    long, short = max(shape), min(shape)
    flops = (6.0 * long * short**2 + 20.0 * short**3) * (_WIDE_PENALTY if shape[0] < shape[1] else 1.0)
    return flops / FLOPS_PER_ELEMENT


def _compact(basis: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The basis on storage of its own.

    galore-torch 1.0 and apollo-torch 1.0.3 keep a view of the first rows of ``Vh`` (or columns of ``U``), and with it
    all of ``Vh``: 4.5 bytes an element instead of 0.75 for a 2048 x 2048 matrix at rank 128.
    """
    if isinstance(basis, list):
        return [part.clone() if _is_part(part) else part for part in basis]
    return basis.clone() if _is_part(basis) else basis


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def low_rank_hyperparameters(
    *, rank: int = 128, scale: float, projections: Sequence[str] = ONE_SIDED
) -> tuple[Hyperparameter, ...]:
    """What GaLore and APOLLO read from the param groups of low-rank matrices; defaults as the Trainer sets them."""
    return (
        Hyperparameter(
            name="rank", kind="int", default=rank, minimum=1, scope=Scope.MATRIX, meaning="dimension of the subspace"
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
            choices=tuple(projections),
            scope=Scope.MATRIX,
            meaning="which side is projected; std takes the shorter one",
        ),
    )
