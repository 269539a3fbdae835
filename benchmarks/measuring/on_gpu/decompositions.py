"""What GaLore's refresh costs: the singular value decomposition of a gradient, for each shape of the Llamas."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from measuring.on_gpu.rows import Items, Settings
from measuring.timing import synchronize

__all__ = ["items"]

SHAPES = {
    "1B": ((256, 2048), (2048, 2048), (5632, 2048)),
    "8B": ((1024, 4096), (4096, 4096), (14336, 4096)),
    "70B": ((1024, 8192), (8192, 8192), (28672, 8192)),
}
"""Of keys and values, of queries and outputs, of the MLP; the last one's transpose costs the same."""
QUICK = {"tiny": ((16, 64), (64, 64))}
RUNS = 3
LONG_S = 3.0
"""What takes longer is run once."""


def items(settings: Settings) -> Items:
    """The cheapest first: those that no time is left for are the dearest."""
    shapes = QUICK if settings.is_quick else SHAPES
    listed = sorted(
        (rows * columns * min(rows, columns), name, (rows, columns)) for name, rows, columns in flat(shapes)
    )
    return {
        f"{shape[0]:,} × {shape[1]:,} (Llama-{name})": partial(decomposed, shape, settings) for _, name, shape in listed
    }


def flat(shapes: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(name, rows, columns) for name, own in shapes.items() for rows, columns in own]


def decomposed(shape: tuple[int, int], settings: Settings) -> dict[str, Any]:
    """As galore-torch calls it: in fp32, without the full matrices. The median of a few, after one."""
    device = settings.place
    matrix = torch.randn(shape, device=device)
    taken = [once(matrix, device)]
    if taken[0] < LONG_S:
        taken = [once(matrix, device) for _ in range(RUNS)]
    return {"ms": round(1e3 * statistics.median(taken), 2), "runs": len(taken)}


def once(matrix: torch.Tensor, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    torch.linalg.svd(matrix, full_matrices=False)
    synchronize(device)
    return time.perf_counter() - start
