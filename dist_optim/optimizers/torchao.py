"""torchao: AdamW with its moments in 8 or 4 bits, quantized in blocks of the flattened tensor.

A tensor is quantized when it has 4096 elements or more and whole blocks. Upstream decides that on what it is given, so
it must be given whole tensors: a shard may fall below the limit, or be cut inside a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.errors import StateDictError
from dist_optim.optimizers.common import betas, epsilon, flag, learning_rate, weight_decay
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

_PARTS = ("codes", "scale", "qmap")
"""The plain tensors of a quantized one: packed values, one scale a block, and the table of the values of the codes."""
_SIGNED = "signed"
_MIN_NUMEL = 4096


class TorchAODriver(UpstreamDriver):
    """Turns torchao's quantized tensors into plain ones and back.

    Args:
        state_class: Upstream's tensor subclass for quantized moments.
        is_packed: Whether two codes share a byte.
    """

    def __init__(self, state_class: UpstreamClass, is_packed: bool) -> None:
        self.state_class = state_class
        self.is_packed = is_packed

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if self.is_packed and values["block_size"] % 2:
            return f"4-bit state is packed in pairs: block_size must be even, not {values['block_size']}."
        if values["amsgrad"] and _is_quantized(shape, values["block_size"]):
            return (
                "torchao (0.18) cannot take the maximum of quantized moments, and fails in the first step. "
                "Pass amsgrad=False, or choose adamw_torch."
            )
        return ""

    def why_not_divided(self, dtype: torch.dtype, values: Mapping[str, Any]) -> str:
        if values["bf16_stochastic_round"] and dtype is torch.bfloat16:
            return (
                "bf16_stochastic_round=True rounds with numbers from the process's random generator. Ranks that step "
                "different parameters draw other numbers than one process does, so the run would not be the upstream "
                "one. Train fp32 parameters, train in one process, or pass bf16_stochastic_round=False."
            )
        return ""

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        encoded: dict[str, Any] = {}
        for key, value in state.items():
            if hasattr(value, "__tensor_flatten__"):
                encoded |= {f"{key}.{part}": getattr(value, part) for part in (*_PARTS, _SIGNED)}
            else:
                encoded[key] = value
        return super().encode_state(encoded)

    def write_state(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        restored = {key: value for key, value in state.items() if "." not in key}
        for key in {key.partition(".")[0] for key in state if "." in key}:
            restored[key] = self._quantized(parameter, {part: state[f"{key}.{part}"] for part in (*_PARTS, _SIGNED)})
        _check_block_size(optimizer, parameter, restored)
        super().write_state(optimizer, parameter, restored)

    def _quantized(self, parameter: Tensor, parts: Mapping[str, Any]) -> Tensor:
        shape = {"shape": parameter.shape} if self.is_packed else {}  # packed codes are flat and cannot tell it
        upstream: Any = self.state_class()
        # Before torchao 0.17 it takes no dtype, and appears as one of the default dtype.
        takes_dtype = "dtype" in inspect.signature(upstream.__new__).parameters
        quantized: Tensor = upstream(**parts, **shape, **({"dtype": parameter.dtype} if takes_dtype else {}))
        return quantized


def _is_quantized(shape: torch.Size, block_size: int) -> bool:
    """Upstream's rule, on the shape of the whole tensor."""
    return shape.numel() >= _MIN_NUMEL and shape.numel() % block_size == 0


def _check_block_size(optimizer: Optimizer, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse state with other blocks: upstream would go on with the state's, whatever the user asked for.

    Raises:
        StateDictError: The state's block size is not the optimizer's.
    """
    upstream: Any = optimizer
    block_size: int = upstream.block_size
    is_due = _is_quantized(parameter.shape, block_size)
    saved = getattr(state.get("exp_avg"), "block_size", None)
    if "exp_avg" in state and saved != (block_size if is_due else None):
        raise StateDictError(
            f"State of a parameter of shape {tuple(parameter.shape)} was saved with "
            f"{'no quantization' if saved is None else f'block_size={saved}'}, which is not what this optimizer's "
            f"block_size={block_size} gives. Build it with the block_size of the saved run."
        )


def _spec(bits: int, state_bytes: str, block_size_note: str) -> OptimizerSpec:
    return OptimizerSpec(
        name=f"adamw_torch_{bits}bit",
        load=UpstreamClass("torchao.optim", f"AdamW{bits}bit"),
        package="torchao",
        extra="torchao",
        traits=frozenset({Trait.BLOCKWISE}),
        hyperparameters=(
            learning_rate(),
            betas(),
            epsilon(),
            weight_decay(0.0),
            flag("amsgrad", False, "keep the maximum of the second moment (torchao 0.18: unquantized tensors only)"),
            Hyperparameter(
                name="block_size",
                kind="int",
                default=256,
                minimum=2,
                scope=Scope.CONSTRUCTOR,
                meaning=f"elements that share a scale{block_size_note}",
            ),
            flag(
                "bf16_stochastic_round",
                False,
                "round bf16 weights up or down at random instead of to the nearest (one process only)",
                scope=Scope.CONSTRUCTOR,
            ),
        ),
        driver=TorchAODriver(
            UpstreamClass(f"torchao.optim.subclass_{bits}bit", f"OptimState{bits}bit"), is_packed=bits == 4
        ),
        paper="https://arxiv.org/abs/2110.02861" if bits == 8 else "https://arxiv.org/abs/2309.01507",
        summary=f"AdamW with {bits}-bit moments, compiled by torch for each shape of parameter",
        licence="BSD-3-Clause",
        state_bytes=f"{state_bytes}; tensors below 4096 elements or without whole blocks: 8 (fp32), 4 (bf16)",
        needs=("a C++ compiler on CPU, Triton on CUDA",),
    )


SPECS = (
    _spec(8, "2.03", ""),
    # The Trainer passes 256 for both.
    _spec(4, "1.03", " (upstream's own default is 128; the Trainer's is this one)"),
)
