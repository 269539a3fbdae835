"""FlashOptim's Triton kernels on a CPU, under Triton's interpreter: slow, and the same arithmetic.

``enable()`` must run before ``triton`` is imported, so call it in a process of its own (a rank of a fresh pool).
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from dist_optim.optimizers.flash import FlashDriver

BLOCK_SIZE = 1024


def enable() -> None:
    """Make flashoptim and dist_optim believe that kernels run here; nothing else sees a GPU. May be called again."""
    if os.environ.get("TRITON_INTERPRET") == "1" and "flashoptim" in sys.modules:
        return
    assert "triton" not in sys.modules, "triton decides between compiler and interpreter when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    import flashoptim.optimizers

    flash: Any = flashoptim.optimizers
    flash.torch = _TorchWithCuda("torch")
    flash._get_sm_count = lambda device=None: 4
    flash.libdevice = SimpleNamespace(pow=_power, copysign=_copysign)
    flash._triton_quantize_kernel = _WithoutAutotuning(flash._triton_quantize_kernel)
    flash._triton_dequantize_kernel = _WithoutAutotuning(flash._triton_dequantize_kernel)
    flash._MaybeQuantizedTensor.set_data = _set_data
    FlashDriver.runs_kernels_on = lambda self, device: True  # type: ignore[method-assign]


class _TorchWithCuda(ModuleType):
    """torch, as one module sees it."""

    cuda = SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _WithoutAutotuning:
    """An autotuned kernel in one configuration: timing needs a device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel.fn

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.kernel[grid](*arguments, BLOCK_SIZE_N=BLOCK_SIZE)


def _set_data(state: Any, data: torch.Tensor) -> None:
    """Upstream's, without its check that the tensor is on CUDA."""
    import flashoptim.optimizers as flash

    if state._try_quantize:
        how = {"signed": state._signed, "sqrt": state._sqrt, "softsign": state._softsign}
        state._data = None
        state._quantized, state._scales = flash.quantize(data, **how)
    else:
        state._data, state._quantized, state._scales = data.to(state._storage_dtype), None, None


def _power(base: Any, exponent: Any) -> float:
    return float(_number(base) ** _number(exponent))


def _number(scalar: Any) -> Any:
    """A kernel's scalar argument: the interpreter hands some over as they are, and wraps others."""
    return scalar.handle.data.item() if hasattr(scalar, "handle") else scalar


def _copysign(magnitude: Any, sign: Any) -> Any:
    import triton.language as tl

    return tl.where(sign < 0, -magnitude, magnitude)
