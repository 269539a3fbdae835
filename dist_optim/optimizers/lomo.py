"""LOMO and AdaLomo, written from their papers, with the arithmetic of lomo-optim to the bit.

lomo-optim's classes take a whole model, read one rate for all of it, and step inside hooks that walk over every
parameter. These are ordinary optimizers: param groups, ``step()``, state in ``state``. ``dist_optim.inside_backward``
steps them inside backward.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.optimizers.common import CLIP_GRAD_NORM, factored_moment, learning_rate, limit, weight_decay
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

__all__ = ["SPECS", "AdaLomo", "Lomo"]


class _ClippingOptimizer(Optimizer):
    """What both share: gradients in fp32, clipped by value, then by the norm of all gradients together.

    The norm is not known here, where a rank may hold a part of the tensors: who steps the optimizer sets
    ``clip_coefficient`` before each step.
    """

    clip_coefficient: Tensor | None = None

    def __init__(
        self, params: Any, defaults: dict[str, Any], clip_grad_norm: float | None, clip_grad_value: float | None
    ) -> None:
        super().__init__(params, defaults)
        self.clip_grad_norm = clip_grad_norm
        self.clip_grad_value = clip_grad_value

    def clipped(self, gradient: Tensor) -> Tensor:
        """The gradient in fp32 and within its bounds; the original is left as it is."""
        gradient = gradient.float()
        if self.clip_grad_value is not None:
            gradient = gradient.clamp(-self.clip_grad_value, self.clip_grad_value)
        if self.clip_coefficient is not None:
            gradient = gradient.mul(self.clip_coefficient.to(gradient.device))
        return gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.begin_step(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.clipped(parameter.grad), group)
        return loss

    def begin_step(self, group: dict[str, Any]) -> None:
        """What is counted once a step, with and without gradients."""

    def update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        """Step one parameter, in fp32."""
        raise NotImplementedError


class Lomo(_ClippingOptimizer):
    """LOMO's update: ``p = p (1 - lr * weight_decay) - lr * g``, in fp32."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, clip_grad_norm, clip_grad_value)

    def update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        weight = parameter.float()
        if group["weight_decay"] > 0.0:
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(gradient, alpha=-group["lr"])
        parameter.copy_(weight)


class AdaLomo(_ClippingOptimizer):
    """AdaLomo's update: an Adafactor-like second moment, and each tensor's rate scaled by its root mean square.

    Args:
        loss_scale: Accepted for scripts of lomo-optim, which multiplies the loss by it and divides gradients by it. As
            a power of two, the only value that is let through, it cancels to the bit; nothing is scaled here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        loss_scale: float = 2.0**10,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "step_num": 0}
        super().__init__(params, defaults, clip_grad_norm, clip_grad_value)
        self.eps = eps
        self.clip_threshold = clip_threshold
        self.decay_rate = decay_rate

    def begin_step(self, group: dict[str, Any]) -> None:
        group["step_num"] += 1

    def update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_zero_moments(parameter))
        decay = 1.0 - math.pow(group["step_num"], self.decay_rate)
        update = _normalized(gradient, state, decay, self.eps[0])
        rms = update.norm(2) / update.numel() ** 0.5
        update.div_((rms / self.clip_threshold).clamp_(min=1.0))
        weight = parameter.float()
        # One wait for the device; upstream has two. Unless the bound is larger, its scale and rate are fp32,
        # and are rounded here at the same places.
        rms_of_weight = (torch.norm(weight, 2.0) / math.sqrt(parameter.numel())).item()
        rounded = _as_fp32 if rms_of_weight > _as_fp32(self.eps[1]) else float
        rate = rounded(rounded(group["lr"]) * max(self.eps[1], rms_of_weight))
        if group["weight_decay"] > 0.0:
            weight.mul_(rounded(1.0 - rounded(rate * rounded(group["weight_decay"]))))
        weight.add_(update, alpha=-rate)
        parameter.copy_(weight)


def _as_fp32(value: float) -> float:
    """Rounded once; of a sum or product of two fp32 values it is what fp32 arithmetic gives."""
    return ctypes.c_float(float(value)).value


def _zero_moments(parameter: Tensor) -> dict[str, Tensor]:
    """The second moment, in fp32: of rows and columns for a matrix, of elements for a vector."""
    names = ("exp_avg_sq_row", "exp_avg_sq_col") if parameter.ndim == 2 else ("exp_avg_sq",)
    sizes = zip(names, parameter.shape, strict=True)
    return {name: torch.zeros(size, dtype=torch.float32, device=parameter.device) for name, size in sizes}


def _normalized(gradient: Tensor, state: Mapping[str, Tensor], decay: float, floor: float) -> Tensor:
    """The gradient divided by the root of its second moment, which is moved on first."""
    square = gradient**2 + floor
    if gradient.ndim == 1:
        moment = state["exp_avg_sq"].mul_(decay).add_(square, alpha=1.0 - decay)
        return moment.rsqrt().mul_(gradient)
    rows = state["exp_avg_sq_row"].mul_(decay).add_(square.mean(dim=-1), alpha=1.0 - decay)
    columns = state["exp_avg_sq_col"].mul_(decay).add_(square.mean(dim=-2), alpha=1.0 - decay)
    by_row = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return by_row.mul(columns.rsqrt().unsqueeze(-2)).mul_(gradient)


class LomoDriver(UpstreamDriver):
    """Hands the norm of all gradients to the optimizer where it clips by it."""

    def needs_total_norm(self, values: Mapping[str, Any]) -> bool:
        return values["clip_grad_norm"] is not None

    def take_total_norm(self, optimizer: Optimizer, total: Tensor) -> None:
        assert isinstance(optimizer, _ClippingOptimizer) and optimizer.clip_grad_norm is not None
        optimizer.clip_coefficient = torch.clamp(optimizer.clip_grad_norm / (total + 1e-6), max=1.0)


class AdaLomoDriver(LomoDriver):
    """Refuses the tensors that AdaLomo does not factor, and a loss scale that would round."""

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if len(shape) not in (1, 2):
            return (
                f"AdaLomo keeps second moments of vectors and matrices; a tensor with {len(shape)} dimensions fails in "
                "lomo-optim. Freeze it, give it to another optimizer (params=), or use adafactor for all."
            )
        if math.frexp(values["loss_scale"])[0] != 0.5:
            return (
                f"loss_scale={values['loss_scale']:g} is not a power of two: scaling the loss by it and gradients back "
                "rounds, and nothing is scaled here. Leave loss_scale out, or use a power of two, which cancels."
            )
        return ""

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        return 4.0 * shape.numel()


_CLIPS = (
    CLIP_GRAD_NORM,
    limit("clip_grad_value", "largest absolute value of a gradient's element"),
)
_COMMON: dict[str, Any] = {"package": "dist-optim", "licence": "Apache-2.0"}

SPECS = (
    OptimizerSpec(
        name="lomo",
        load=UpstreamClass("dist_optim.optimizers.lomo", "Lomo"),
        stands_for=(UpstreamClass("lomo_optim", "Lomo"),),
        traits=frozenset({Trait.ELEMENTWISE, Trait.FUSED_BACKWARD}),
        hyperparameters=(learning_rate(), *_CLIPS, weight_decay(0.0)),
        driver=LomoDriver(),
        paper="https://arxiv.org/abs/2306.09782",
        summary="SGD fused into backward: neither state nor stored gradients",
        state_bytes="0, and no gradients",
        **_COMMON,
    ),
    OptimizerSpec(
        name="adalomo",
        load=UpstreamClass("dist_optim.optimizers.lomo", "AdaLomo"),
        stands_for=(UpstreamClass("lomo_optim", "AdaLomo"),),
        traits=frozenset({Trait.WHOLE_TENSOR, Trait.FUSED_BACKWARD}),
        hyperparameters=(
            learning_rate(),
            Hyperparameter(
                name="loss_scale",
                kind="float",
                default=2.0**10,
                minimum=0.0,
                minimum_open=True,
                scope=Scope.CONSTRUCTOR,
                meaning="a power of two; lomo-optim multiplies the loss by it and divides gradients, which cancels",
            ),
            *factored_moment(Scope.CONSTRUCTOR),
            *_CLIPS,
            weight_decay(0.0),
        ),
        driver=AdaLomoDriver(),
        paper="https://arxiv.org/abs/2310.10195",
        summary="Adafactor-like second moments, fused into backward: no stored gradients",
        state_bytes="4 (m + n) / mn for an m x n matrix, and no gradients",
        **_COMMON,
    ),
)
