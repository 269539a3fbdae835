"""How fast parts are packed into what travels and unpacked behind it, beside what the card copies at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_optim.exchange.copies import cut
from dist_optim.exchange.packed import pack, unpack
from measuring.on_gpu.rows import Items, Settings
from measuring.timing import synchronize

__all__ = ["items"]

WIDTH, INNER, NARROW = 4096, 14336, 1024
LAYER = ((WIDTH, WIDTH), (NARROW, WIDTH), (NARROW, WIDTH), (WIDTH, WIDTH), *[(INNER, WIDTH)] * 2, (WIDTH, INNER))
"""The seven matrices of a layer of Llama-8B."""
KINDS: dict[str, tuple[tuple[tuple[int, ...], ...], torch.dtype, bool]] = {
    "a layer of Llama-8B, bf16": (LAYER, torch.bfloat16, False),
    "a layer of Llama-8B, bf16, halves of its columns": (LAYER, torch.bfloat16, True),
    "600 tensors of 64 × 64, fp32": (((64, 64),) * 600, torch.float32, False),
    "one tensor of 8,192 × 8,192, bf16": (((8192, 8192),), torch.bfloat16, False),
}
QUICK = {"50 tensors of 64 × 64, fp32": (((64, 64),) * 50, torch.float32, True)}
RUNS = 10


def items(settings: Settings) -> Items:
    return {name: partial(rates, *kind, settings) for name, kind in (QUICK if settings.is_quick else KINDS).items()}


def rates(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, is_cut: bool, settings: Settings) -> dict[str, Any]:
    """In GB/s, read and written bytes together."""
    device = settings.place
    whole = [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]
    parts = [one[:, : one.shape[1] // 2] if is_cut else one for one in whole]
    flat = pack(parts, dtype, device)
    other = torch.empty_like(flat)
    moved = 2 * flat.nbytes

    def rate(act: Callable[[], Any]) -> float:
        return round(moved / seconds(act, device) / 1e9, 1)

    targets: list[Tensor] = cut(other, parts)
    return {
        "megabytes": round(flat.nbytes / 1e6, 1),
        "pack_gb_s": rate(lambda: pack(parts, dtype, device)),
        "unpack_gb_s": rate(lambda: unpack(flat, parts)),
        "foreach_copy_gb_s": rate(lambda: torch._foreach_copy_(targets, parts)),
        "card_gb_s": rate(lambda: other.copy_(flat)),
    }


def seconds(act: Callable[[], Any], device: torch.device) -> float:
    """Of one act, of several after one."""
    act()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(RUNS):
        act()
    synchronize(device)
    return (time.perf_counter() - start) / RUNS
