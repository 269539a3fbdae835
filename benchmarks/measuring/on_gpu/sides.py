"""Upstream and ours on the same tensors, by the cases of ``tests/cases``: what both are given is written there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import all_cases
from parity import Case
from torch import Tensor

from measuring.on_gpu.rows import Settings

__all__ = ["cases_on", "join_alone", "kernel_cases", "leave_uncompiled", "one_case_a_name", "without_decompositions"]

COMPILED = ("adamw_torch_4bit", "adamw_torch_8bit")


def cases_on(settings: Settings) -> list[Case]:
    """All of them, where the settings want them."""
    return [replace(case, device=settings.device) for case in all_cases()]


def kernel_cases(settings: Settings) -> list[Case]:
    """FlashOptim with its own kernels, which run on a GPU alone.

    Raises:
        ImportError: Their file imports pytest, which is not here.
    """
    from test_flash_kernels import CASES

    return [replace(case, device=settings.device, label=f"{case.label} (kernels)") for case in CASES]


def one_case_a_name(settings: Settings) -> dict[str, Case]:
    """The first of each optimizer; FlashOptim's with kernels where there is a GPU."""
    found = {case.name: case for case in reversed(cases_on(settings))}
    if settings.device == "cuda":
        with suppress(ImportError):
            found |= {case.name: case for case in reversed(kernel_cases(settings))}
    return found


def join_alone(settings: Settings) -> None:
    """Make this process the only rank of a group, unless it is in one already."""
    if dist.is_initialized():
        return
    device = settings.place if settings.device == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    backend = "nccl" if settings.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)


def leave_uncompiled(case: Case) -> None:
    """torchao compiles its update for each shape; both sides run it as it is written. For the rest of the process."""
    if case.name in COMPILED:
        torch.compiler.set_stance("force_eager")


@contextmanager
def without_decompositions() -> Iterator[None]:
    """Singular vectors are unit vectors at no cost: GaLore's first step on a large model takes minutes otherwise."""

    def svd(matrix: Tensor, full_matrices: bool = True, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = matrix.shape
        rank = min(rows, columns)
        return unit(matrix, rows, rank), matrix.new_ones(rank), unit(matrix, rank, columns)

    with mock.patch.object(torch.linalg, "svd", svd):
        yield


def unit(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.eye(rows, columns, dtype=like.dtype, device=like.device)
