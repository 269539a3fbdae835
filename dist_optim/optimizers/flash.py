"""FlashOptim: Adam, SGD and Lion with 8-bit state and error-corrected 16-bit weights, in Triton kernels.

*Plain mode* is ``quantize=False, fused=False, master_weight_bits=None``: the same formulas in eager torch, on any
device, with state in the parameter's precision. Every other mode needs CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.errors import StateDictError
from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

_MODULE = "flashoptim.optimizers"
_PLAIN_MODE = "quantize=False, fused=False, master_weight_bits=None"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# In encoded state, after the name of a quantized tensor; upstream's own checkpoints use the same names.
_CODES, _SCALES = "::quantized", "::scales"
_AS_FLOATS = "::as_floats"
"""Marks state whose quantized tensors are saved as floats (``compress_state_dict=False``)."""


class FlashDriver(UpstreamDriver):
    """Keeps quantized state exact, and refuses before step 1 what upstream refuses in the middle of one."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        bits = arguments["master_weight_bits"]
        is_allowed = os.environ.get("FLASHOPTIM_ALLOW_INEFFECTIVE_MASTER_WEIGHT_BITS")  # upstream's own switch
        dtypes = {parameter.dtype for group in param_groups for parameter in group["params"]}
        if bits is not None and dtypes == {torch.float32} and not is_allowed:
            # flashoptim 0.1.4 advises to leave the argument out, but its default is 24: that fails again.
            raise ValueError(
                f"master_weight_bits={bits} corrects the rounding of 16-bit parameters, and all parameters are fp32. "
                "Pass master_weight_bits=None, or train a bf16 model"
            )
        return super().construct(optimizer_class, param_groups, arguments)

    def built_with(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"master_weight_bits": {0: None, 3: 24, 4: 32}.get(group.get("master_bytewidth", 3), 24)}

    def runs_on_slices(self, values: Mapping[str, Any], device: torch.device) -> bool:
        # The check of numerics takes the largest weight of the whole tensor.
        return not _kernel_modes(values) and not values["check_numerics"]

    def keeps_precision(self, values: Mapping[str, Any]) -> bool:
        return values["master_weight_bits"] is not None

    def runs_kernels_on(self, device: torch.device) -> bool:
        """Whether upstream's Triton kernels can step a parameter on this device."""
        return device.type == "cuda"

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        modes = _kernel_modes(values)
        if modes and not self.runs_kernels_on(device):
            return (
                f"{' and '.join(modes)} run Triton kernels, which need CUDA; the model is on {device}. Train on a GPU, "
                f"or pass {_PLAIN_MODE} for FlashOptim's plain mode, which runs anywhere: the same formulas, with "
                f"state in the parameters' precision ({dtype})."
            )
        if dtype not in _DTYPES:
            return f"FlashOptim steps fp32, bf16 and fp16 parameters, not {dtype}. Convert the model first."
        return ""

    def step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        upstream: Any = optimizer
        for parameter in parameters if upstream._fused else ():
            # The fused kernels refuse other strides, on the owner alone and in the middle of a step.
            if parameter.grad is not None:
                parameter.data, parameter.grad = parameter.data.contiguous(), parameter.grad.contiguous()
        super().step(optimizer, parameters)
        for parameter in parameters:
            state = self.read_state(optimizer, parameter)
            if parameter.numel() == 0 and "step" in state:
                # flashoptim 0.1.4 returns before it counts; ranks with and without a part would disagree.
                state["step"] += 1

    # State --------------------------------------------------------------------------------------------------------
    # It goes around upstream's state_dict and load_state_dict, which view and cast codes and scales so that they
    # survive torch's cast to the parameter's dtype. Nothing is cast here: all are saved as they are.

    def read_state(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
        upstream: Any = optimizer
        state = super().read_state(optimizer, parameter)
        return state if upstream._compress_state_dict or not state else {**state, _AS_FLOATS: True}

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        encoded: dict[str, Any] = {}
        for key, value in state.items():
            if key == _AS_FLOATS:
                continue
            if not hasattr(value, "is_quantized") or isinstance(value, Tensor):
                encoded[key] = value
            elif value.is_quantized() and _AS_FLOATS not in state:
                encoded |= {key + _CODES: value.quantized, key + _SCALES: value.scales}
            else:
                encoded[key] = value.materialize()
        return super().encode_state(encoded)

    def write_state(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        (group,) = [g for g in optimizer.param_groups if any(parameter is other for other in g["params"])]
        _check_modes(group, parameter, state)
        upstream: Any = optimizer
        quantized: Mapping[str, Any] = upstream.quantized_state_spec
        maybe_quantized: Any = UpstreamClass(_MODULE, "_MaybeQuantizedTensor")()
        restored = {key: value for key, value in state.items() if key.split("::")[0] not in quantized}
        for key, kind in quantized.items():
            if key in state or key + _CODES in state:
                restored[key] = maybe_quantized.from_state_dict(
                    state,
                    name=key,
                    try_quantize=group["quantize"],
                    signed=kind.signed,
                    sqrt=kind.sqrt,
                    softsign=kind.softsign,
                    storage_dtype=parameter.dtype,
                )
        super().write_state(optimizer, parameter, restored)


def _kernel_modes(values: Mapping[str, Any]) -> list[str]:
    """The settings that run Triton kernels; none in plain mode."""
    modes = [f"{key}=True" for key in ("quantize", "fused") if values[key]]
    bits = values["master_weight_bits"]
    return modes + ([f"master_weight_bits={bits}"] if bits is not None else [])


def _check_modes(group: ParamGroup, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse state of another mode: upstream would go on in the state's mode, whatever the user asked for.

    Raises:
        StateDictError: The state is quantized and this optimizer is not, or error bits differ in width.
    """
    if not group["quantize"] and any(key.endswith(_CODES) for key in state):
        raise StateDictError(
            "The state was saved with quantize=True, and this optimizer has quantize=False. Build it with the "
            "settings of the saved run (or save with compress_state_dict=False there)."
        )
    saved = state["error_bits"].element_size() if "error_bits" in state else 0
    wanted = max(0, group["master_bytewidth"] - parameter.element_size())
    if saved != wanted:
        raise StateDictError(
            f"The state was saved with {saved} bytes of error bits a parameter, and this optimizer keeps {wanted} for "
            f"{parameter.dtype}. Build it with the master_weight_bits of the saved run."
        )


def _constructor_flag(name: str, default: bool, meaning: str) -> Hyperparameter:
    return flag(name, default, meaning, scope=Scope.CONSTRUCTOR)


_MODES = (
    _constructor_flag("quantize", True, "state in 8 bits, with an fp16 scale for each 32 elements (CUDA)"),
    _constructor_flag(
        "compress_state_dict", True, "save quantized state as it is; False saves it as floats, exactly as well"
    ),
    Hyperparameter(
        name="master_weight_bits",
        kind="int",
        default=24,
        choices=(24, 32),
        optional=True,
        scope=Scope.CONSTRUCTOR,
        meaning="precision of the weights of a 16-bit model, kept as error bits (CUDA); None for fp32 models",
    ),
    _constructor_flag(
        "check_numerics", False, "fail where the learning rate is too small to move a tensor's largest weight"
    ),
    _constructor_flag("fused", True, "the whole step in one Triton kernel (CUDA)"),
)
_DECOUPLE_LR = _constructor_flag("decouple_lr", False, "decay by lr / initial_lr instead of lr")
_L2 = "L2 penalty, added to the gradient"


def _momentum(decay: tuple[Hyperparameter, ...]) -> tuple[Hyperparameter, ...]:
    return (
        learning_rate(),
        Hyperparameter(name="momentum", kind="float", default=0.0, minimum=0.0, meaning="momentum factor"),
        Hyperparameter(
            name="dampening",
            kind="float",
            default=0.0,
            meaning="dampening of the momentum, in the first step too (torch leaves that one out)",
        ),
        *decay,
        _constructor_flag("nesterov", False, "Nesterov momentum (needs momentum > 0 and dampening 0)"),
        *_MODES,
    )


def _spec(
    name: str, upstream: str, summary: str, state_bytes: str, hyperparameters: tuple[Hyperparameter, ...]
) -> OptimizerSpec:
    return OptimizerSpec(
        name=name,
        load=UpstreamClass("flashoptim", upstream),
        package="flashoptim",
        extra="flash",
        traits=frozenset({Trait.ELEMENTWISE, Trait.BLOCKWISE}),
        hyperparameters=hyperparameters,
        driver=FlashDriver(),
        paper="https://arxiv.org/abs/2602.23349",
        summary=summary,
        licence="Apache-2.0",
        state_bytes=state_bytes,
        needs=(f"CUDA, except with {_PLAIN_MODE}",),
    )


_ERROR_BITS = "+ 1 or 2 for master_weight_bits 24 or 32 of 16-bit weights"
_TWO_MOMENTS = f"2.13 {_ERROR_BITS}; plain: 8 (fp32), 4 (bf16)"
_ONE_MOMENT = f"1.06 {_ERROR_BITS}; plain: 4 (fp32), 2 (bf16)"

SPECS = (
    _spec(
        "flash_adamw",
        "FlashAdamW",
        "AdamW with 8-bit moments and 24-bit weights for bf16 models",
        _TWO_MOMENTS,
        (learning_rate(), betas(), epsilon(), weight_decay(1e-2), _DECOUPLE_LR, *_MODES),
    ),
    _spec(
        "flash_adam",
        "FlashAdam",
        "Adam with 8-bit moments and 24-bit weights for bf16 models",
        _TWO_MOMENTS,
        (learning_rate(), betas(), epsilon(), weight_decay(0.0, meaning=_L2), *_MODES),
    ),
    _spec(
        "flash_sgd",
        "FlashSGD",
        "SGD with an 8-bit momentum and 24-bit weights for bf16 models",
        f"{_ONE_MOMENT}; no moment without momentum",
        _momentum((weight_decay(0.0, meaning=_L2),)),
    ),
    _spec(
        "flash_sgdw",
        "FlashSGDW",
        "SGD with decoupled weight decay, an 8-bit momentum and 24-bit weights for bf16 models",
        f"{_ONE_MOMENT}; no moment without momentum",
        _momentum((weight_decay(0.0), _DECOUPLE_LR)),
    ),
    _spec(
        "flash_lion",
        "FlashLion",
        "Lion with an 8-bit momentum and 24-bit weights for bf16 models",
        _ONE_MOMENT,
        (learning_rate(), betas(0.9, 0.99), weight_decay(0.0), _DECOUPLE_LR, *_MODES),
    ),
)
