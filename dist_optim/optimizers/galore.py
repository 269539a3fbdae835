"""GaLore: Adam or Adafactor in a low-rank subspace of each matrix's gradient, found anew by an SVD every few steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.errors import UnsupportedError
from dist_optim.optimizers.bnb import MIN_8BIT_SIZE, isolate_overrides, refuse_overrides
from dist_optim.optimizers.common import adafactor_hyperparameters, betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.optimizers.low_rank import ONE_SIDED, LowRankDriver, low_rank_hyperparameters
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

__all__ = ["SPECS"]


class GaLoreDriver(LowRankDriver):
    """Projectors of galore-torch."""

    def projector_class(self, fields: Mapping[str, Any]) -> type:
        return UpstreamClass("galore_torch.galore_projector", "GaLoreProjector")()

    def state_classes(self) -> tuple[type, ...]:
        return (self.projector_class({}),)

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        reason = super().why_refused(shape, dtype, device, values)
        if reason or "rank" not in values:
            return reason
        if values["proj_type"] == "reverse_std" and shape[0] < shape[1] and values["rank"] >= shape[0]:
            # galore-torch 1.0 takes the side for the way back from the projected shape, and multiplies misfits.
            return (
                f"proj_type='reverse_std' cannot project a {shape[0]} x {shape[1]} matrix to rank {values['rank']}: "
                f"upstream fails unless rank < {shape[0]}. Lower rank, or use proj_type='std'."
            )
        return ""


class GaLoreAdamWDriver(GaLoreDriver):
    """galore-torch's AdamW, without its advice to take torch's."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        # galore-torch 1.0 warns that its AdamW is deprecated in favour of torch's, which has no projection.
        return super().construct(optimizer_class, param_groups, {**arguments, "no_deprecation_warning": True})


class GaLoreAdafactorDriver(GaLoreDriver):
    """galore-torch's Adafactor; refuses a learning rate that nobody sets."""

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if values["lr"] is None and not values["relative_step"]:
            return "lr=None needs relative_step=True, which computes the rate. Give lr, or set relative_step=True."
        return super().why_refused(shape, dtype, device, values)


class GaLoreAdamW8bitDriver(GaLoreDriver):
    """galore-torch's 8-bit AdamW, as it was meant before bitsandbytes changed its arguments."""

    rebinds_parameters = True  # galore-torch 1.0 steps in p.data, which holds the projection meanwhile, and in p.grad

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        optimizer = super().construct(optimizer_class, param_groups, arguments)
        _undo_shifted_arguments(optimizer)
        isolate_overrides(optimizer)
        return optimizer

    def values_by_parameter(self, model: nn.Module, names: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        refuse_overrides(model, "galore_adamw_8bit", "which do not fit projected states")
        return {}

    def step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        try:
            _step_wherever_it_runs(optimizer)
        finally:
            # galore-torch 1.0 sets weight decay aside while it steps a matrix; an error in between would lose it.
            for group in optimizer.param_groups:
                if "weight_decay_saved" in group:
                    group["weight_decay"] = group.pop("weight_decay_saved")
        for parameter in parameters:
            # A full copy of the weight, which galore-torch 1.0 leaves on the parameter.
            vars(parameter).pop("saved_data", None)
        self.compact_projectors(optimizer, parameters)


def _undo_shifted_arguments(optimizer: Any) -> None:
    """Put back two arguments that bitsandbytes takes for others.

    galore-torch 1.0 passes ``percentile_clipping=100, block_wise=True`` by position. bitsandbytes 0.50 has neither, and
    reads ``max_unorm=100, skip_zeros=True``: updates are then bounded by the norm of a weight that GaLore has set to
    zero, so matrices whose low-rank state is small (32 bits) never move.
    """
    found = (optimizer.args.max_unorm, optimizer.args.skip_zeros)
    if found == (100, True):
        optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.0, False
    elif found != (0.0, False):
        raise UnsupportedError(
            f"galore_adamw_8bit: the installed bitsandbytes reads max_unorm={found[0]!r}, skip_zeros={found[1]!r} from "
            "galore-torch's arguments, which is neither what galore-torch means (0.0, False) nor the known shift of "
            "bitsandbytes 0.50 (100, True). Install bitsandbytes 0.50, or use galore_adamw."
        )


class _TorchWithoutCuda:
    """The ``torch`` that upstream's code sees where there is no CUDA: waiting for the device does nothing."""

    cuda = SimpleNamespace(synchronize=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _step_wherever_it_runs(optimizer: Optimizer) -> None:
    """Upstream's step; without CUDA the same code runs in a namespace of its own, so that nothing global is patched.

    galore-torch 1.0 calls ``torch.cuda.synchronize()`` after every parameter, which fails where torch has no CUDA.
    """
    if torch.cuda.is_available():
        optimizer.step()
        return
    step = inspect.unwrap(type(optimizer).step)
    FunctionType(step.__code__, {**step.__globals__, "torch": _TorchWithoutCuda()}, step.__name__, step.__defaults__)(
        optimizer
    )


_LOW_RANK = low_rank_hyperparameters(scale=0.25, projections=(*ONE_SIDED, "full"))
_COMMON: dict[str, Any] = {
    "package": "galore-torch",
    "extra": "galore",
    "paper": "https://arxiv.org/abs/2403.03507",
    "licence": "Apache-2.0",
}

SPECS = (
    OptimizerSpec(
        name="galore_adamw",
        load=UpstreamClass("galore_torch", "GaLoreAdamW"),
        traits=frozenset({Trait.ELEMENTWISE, Trait.LOW_RANK, Trait.WHOLE_TENSOR}),
        hyperparameters=(
            learning_rate(),
            betas(),
            epsilon(1e-6),
            weight_decay(0.0),
            flag("correct_bias", True, "correct the bias of the running averages"),
            *_LOW_RANK,
        ),
        driver=GaLoreAdamWDriver(),
        summary="AdamW on gradients projected to their leading singular vectors",
        state_bytes="for an m x n matrix, m >= n, rank r: 4 (2mr + rn) / mn; other tensors 8 (fp32)",
        **_COMMON,
    ),
    OptimizerSpec(
        name="galore_adafactor",
        load=UpstreamClass("galore_torch", "GaLoreAdafactor"),
        traits=frozenset({Trait.LOW_RANK, Trait.WHOLE_TENSOR}),
        hyperparameters=(*adafactor_hyperparameters(1e-3), *_LOW_RANK),
        driver=GaLoreAdafactorDriver(),
        summary="Adafactor on gradients projected to their leading singular vectors",
        state_bytes="for an m x n matrix, m >= n, rank r: 4 (rn + m + r) / mn; other matrices 4 (m + n) / mn",
        **_COMMON,
    ),
    OptimizerSpec(
        name="galore_adamw_8bit",
        load=UpstreamClass("galore_torch", "GaLoreAdamW8bit"),
        traits=frozenset({Trait.LOW_RANK, Trait.WHOLE_TENSOR, Trait.BLOCKWISE, Trait.STORAGE_REPLACING}),
        hyperparameters=(learning_rate(), betas(), epsilon(), weight_decay(1e-2), MIN_8BIT_SIZE, *_LOW_RANK),
        driver=GaLoreAdamW8bitDriver(),
        summary="8-bit AdamW (bitsandbytes) on gradients projected to their leading singular vectors",
        state_bytes="for an m x n matrix, m >= n, rank r: (2.03 mr + 4 rn) / mn; 8 mr where mr < 4096",
        **_COMMON,
    ),
)
