"""Methods that precondition a tensor by matrices of its own sides: SOAP, Shampoo, and PSGD with Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.optimizers.pytorch_optimizer import (
    EXTRA,
    FIXED_DECAY,
    LICENCE,
    MAXIMIZE,
    PACKAGE,
    decoupled,
    whole_number,
)
from dist_optim.specs.driver import FLOPS_PER_ELEMENT, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass


class SidesDriver(UpstreamDriver):
    """Products with a square matrix a side; now and then, a decomposition of each."""

    def __init__(self, products: float, decompositions: float, every: str, limit: str = "") -> None:
        """Flops of a step: so many products with a side's matrix, and of decompositions every so many steps."""
        self.products, self.decompositions, self.every, self.limit = products, decompositions, every, limit

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        flops = sum(self.products * 2.0 * shape.numel() * side for side in self._sides(shape, values))
        return shape.numel() + flops / FLOPS_PER_ELEMENT + self.refresh_cost(shape, values)

    def refresh_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        flops = sum(self.decompositions * side**3 for side in self._sides(shape, values))
        return flops / (values.get(self.every) or 1) / FLOPS_PER_ELEMENT

    def _sides(self, shape: torch.Size, values: Mapping[str, Any]) -> list[int]:
        return [side for side in shape if side <= values.get(self.limit, side)] if len(shape) > 1 else []


SPECS = (
    OptimizerSpec(
        name="soap",
        load=UpstreamClass("pytorch_optimizer", "SOAP"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.WHOLE_TENSOR}),
        hyperparameters=(
            learning_rate(3e-3),
            betas(0.95, 0.95),
            Hyperparameter(
                name="shampoo_beta",
                kind="float",
                default=None,
                minimum=0.0,
                maximum=1.0,
                optional=True,
                meaning="decay rate of the preconditioner; None takes the second of betas",
            ),
            weight_decay(1e-2),
            whole_number("precondition_frequency", 10, "steps from one eigenbasis to the next"),
            whole_number("max_precondition_dim", 10000, "longest side that has a preconditioner"),
            flag("merge_dims", False, "merge short dimensions"),
            flag("precondition_1d", False, "precondition vectors too"),
            flag("correct_bias", True, "correct the bias of Adam's averages"),
            flag("normalize_gradient", False, "scale each update to a root mean square of 1"),
            Hyperparameter(
                name="data_format",
                kind="str",
                default="channels_first",
                choices=("channels_first", "channels_last"),
                scope=Scope.CONSTRUCTOR,
                meaning="how 4-D tensors are merged",
            ),
            epsilon(),
            MAXIMIZE,
        ),
        driver=SidesDriver(5.0, 8.0, "precondition_frequency", "max_precondition_dim"),
        paper="https://arxiv.org/abs/2409.11321",
        summary="Adam in the eigenbasis of Shampoo's preconditioner",
        licence=LICENCE,
        state_bytes="for an m x n matrix: 4 (2mm + 2nn + 2mn) / mn (fp32), half in bf16",
    ),
    OptimizerSpec(
        name="shampoo",
        load=UpstreamClass("pytorch_optimizer", "Shampoo"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.WHOLE_TENSOR}),
        hyperparameters=(
            learning_rate(),
            Hyperparameter(
                name="momentum", kind="float", default=0.0, minimum=0.0, maximum=1.0, meaning="momentum factor"
            ),
            weight_decay(0.0),
            decoupled(False),
            FIXED_DECAY,
            whole_number(
                "preconditioning_compute_steps", 1, "steps from one inverse root to the next", 1, Scope.CONSTRUCTOR
            ),
            Hyperparameter(
                name="matrix_eps",
                kind="float",
                default=1e-6,
                minimum=0.0,
                meaning="multiple of the identity that a preconditioner begins as",
            ),
            MAXIMIZE,
        ),
        driver=SidesDriver(2.0, 25.0, "preconditioning_compute_steps"),
        paper="https://arxiv.org/abs/1802.09568",
        summary="gradients times inverse roots of a matrix for each side of the tensor",
        licence=LICENCE,
        state_bytes="for an m x n matrix: 4 (2mm + 2nn) / mn (fp32); 4 more with momentum",
    ),
    OptimizerSpec(
        name="kron",
        load=UpstreamClass("pytorch_optimizer", "Kron"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.WHOLE_TENSOR, Trait.COUPLED}),
        hyperparameters=(
            learning_rate(),
            replace(betas(), name="momentum", kind="float", default=0.9, maximum_open=False, meaning="momentum factor"),
            weight_decay(0.0),
            decoupled(True),
            Hyperparameter(
                name="pre_conditioner_update_probability",
                kind="float",
                default=None,
                minimum=0.0,
                maximum=1.0,
                optional=True,
                meaning="share of the steps that renew the preconditioner; None falls from 1 to 0.03",
            ),
            whole_number("max_size_triangular", 8192, "longest side that has a triangular matrix"),
            whole_number("min_ndim_triangular", 2, "fewest dimensions of a tensor with triangular matrices", 0),
            Hyperparameter(
                name="memory_save_mode",
                kind="str",
                default=None,
                optional=True,
                choices=("one_diag", "smart_one_diag", "all_diag"),
                meaning="which sides have a diagonal in place of a matrix",
            ),
            flag("momentum_into_precondition_update", True, "renew the preconditioner from the momentum"),
            Hyperparameter(
                name="mu_dtype",
                kind="any",
                default=None,
                meaning="torch.dtype of the momentum; None takes the weights'",
            ),
            Hyperparameter(
                name="precondition_dtype",
                kind="any",
                default=torch.float32,
                meaning="torch.dtype of the preconditioner",
            ),
            Hyperparameter(
                name="balance_prob",
                kind="float",
                default=0.01,
                minimum=0.0,
                maximum=1.0,
                scope=Scope.CONSTRUCTOR,
                meaning="probability of balancing the factors in a step that renews them",
            ),
            MAXIMIZE,
        ),
        driver=SidesDriver(4.0, 2.0, "", "max_size_triangular"),
        needs=("opt-einsum, without which torch multiplies in the worst order",),
        paper="https://arxiv.org/abs/1512.04202",
        summary="PSGD: gradients times a learned preconditioner, a triangular matrix for each side of the tensor",
        licence=LICENCE,
        state_bytes="for an m x n matrix: 4 (mm + nn + mn) / mn (fp32)",
    ),
)
