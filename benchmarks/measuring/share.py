"""The optimizer's share of a whole training step of a small Llama, beside stock AdamW's. The body of a rank.

Ours may work inside forward and backward; what these cost more than under stock AdamW then counts as the optimizer's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.integrations.quiet import quieten_libraries
from dist_optim.ranks.agreement import num_ranks
from measuring.models import batch_of_tokens, llama
from measuring.recipes import RECIPES
from measuring.timing import Sample, timed, without_collector

__all__ = ["STOCK", "ShareCell", "measure_share"]

STOCK = "stock AdamW"
WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareCell:
    """What is trained side by side, and for how many steps."""

    layout: str
    ranks: int
    optimizers: tuple[str, ...]
    steps: int = 7
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    """Of ours, besides the recipes'."""

    def __str__(self) -> str:
        return ", ".join([self.layout, f"{self.ranks} ranks", *self.options])


@dataclass(frozen=True, slots=True)
class Trainee:
    """One training run; both parts of its step act on all ranks."""

    backward: Callable[[], None]
    step: Callable[[], None]


def measure_share(cell: ShareCell) -> dict[str, dict[str, float]]:
    """By optimizer, stock AdamW first. Collective; the same on all ranks."""
    quieten_libraries()
    device = torch.device(cell.device, torch.cuda.current_device()) if cell.device == "cuda" else torch.device("cpu")
    trainees = {name: trainee(cell, name, device) for name in (STOCK, *cell.optimizers)}
    parts: dict[str, list[tuple[Sample, Sample]]] = {name: [] for name in trainees}
    with without_collector():
        for _ in range(cell.steps + WARM_UP):
            for name, one in trainees.items():
                parts[name].append((timed(one.backward, device), timed(one.step, device)))
    return {name: shares(taken[WARM_UP:], parts[STOCK][WARM_UP:]) for name, taken in parts.items()}


def trainee(cell: ShareCell, name: str, device: torch.device) -> Trainee:
    """A Llama under its engine, with an optimizer."""
    torch.manual_seed(0)
    model = placed(llama().to(device), cell.layout, device)
    optimizer: torch.optim.Optimizer
    if name == STOCK:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        options = RECIPES[name].options | cell.options
        # A refresh every few steps is measured elsewhere; in a run it is one in hundreds.
        options |= {"update_proj_gap": 200} if "update_proj_gap" in options else {}
        optimizer = dist_optim.build_optimizer(model, name, print_audit=False, **options)
        optimizer.train()
    tokens = batch_of_tokens(device)

    def backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(backward, step)


def placed(model: nn.Module, layout: str, device: torch.device) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh(device.type, (num_ranks(),))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def shares(taken: Sequence[tuple[Sample, Sample]], stock: Sequence[tuple[Sample, Sample]]) -> dict[str, float]:
    """Medians in milliseconds of processor time, and shares of the whole step."""
    backward = statistics.median(one.processor_s for one, _ in taken)
    step = statistics.median(one.processor_s for _, one in taken)
    wall = statistics.median(one.wall_s + other.wall_s for one, other in taken)
    dearer = statistics.median(
        ours.processor_s - theirs.processor_s for (ours, _), (theirs, _) in zip(taken, stock, strict=True)
    )
    return {
        "backward_ms": round(1e3 * backward, 2),
        "step_ms": round(1e3 * step, 2),
        "wall_ms": round(1e3 * wall, 2),
        "share_of_step": round(step / (backward + step), 4),
        "share_with_backward": round((step + dearer) / (backward + step), 4),
    }
