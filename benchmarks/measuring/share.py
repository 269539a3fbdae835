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
from dist_optim.ranks.agreement import num_ranks, own_rank
from measuring.contenders import bare_messages, has_floor, owners_of
from measuring.models import batch_of_tokens, llama
from measuring.recipes import RECIPES, Recipe, in_training
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
    floor: Callable[[], None] | None = None
    """A bound on ``step``: upstream on this rank's share of the tensors, by the same groups, and the messages bare."""


def measure_share(cell: ShareCell) -> dict[str, dict[str, float]]:
    """By optimizer, stock AdamW first. Collective; the same on all ranks."""
    quieten_libraries()
    device = torch.device(cell.device, torch.cuda.current_device()) if cell.device == "cuda" else torch.device("cpu")
    trainees = {name: trainee(cell, name, device) for name in (STOCK, *cell.optimizers)}
    parts: dict[str, list[tuple[Sample, Sample]]] = {name: [] for name in trainees}
    floors: dict[str, list[Sample]] = {name: [] for name, one in trainees.items() if one.floor is not None}
    with without_collector():
        for _ in range(cell.steps + WARM_UP):
            for name, one in trainees.items():
                parts[name].append((timed(one.backward, device), timed(one.step, device)))
                if one.floor is not None:
                    floors[name].append(timed(one.floor, device))
    return {
        name: shares(taken[WARM_UP:], parts[STOCK][WARM_UP:], floors.get(name, [])[WARM_UP:])
        for name, taken in parts.items()
    }


def trainee(cell: ShareCell, name: str, device: torch.device) -> Trainee:
    """A Llama under its engine, with an optimizer."""
    torch.manual_seed(0)
    model = placed(llama().to(device), cell.layout, device)
    optimizer: torch.optim.Optimizer
    floor = None
    if name == STOCK:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        options = RECIPES[name].options | cell.options
        # A refresh every few steps is measured elsewhere; in a run it is one in hundreds.
        options |= {"update_proj_gap": 200} if "update_proj_gap" in options else {}
        optimizer = ours = dist_optim.build_optimizer(model, name, print_audit=False, **options)
        ours.train()
        if not cell.options and ours.spec.name == name and has_floor(RECIPES[name], cell.layout):
            floor = floor_of(ours, RECIPES[name], cell.layout)
    tokens = batch_of_tokens(device)

    def backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(backward, step, floor)


def floor_of(optimizer: dist_optim.DistributedOptimizer, recipe: Recipe, layout: str) -> Callable[[], None]:
    """Steps again and again by the same gradients."""
    held, device = [one.parameter for one in optimizer.holdings.placed], optimizer.holdings.placed[0].device
    owners = dict(zip(map(id, held), owners_of(held), strict=True))
    groups = []
    for group in optimizer.param_groups:
        mine = [
            nn.Parameter(torch.randn_like(torch.empty(one.shape)))
            for one in group["params"]
            if owners[id(one)] == own_rank()
        ]
        groups += [{**group, "params": mine}] if mine else []
        for one in mine:
            one.grad = torch.randn_like(one)
    upstream = in_training(recipe.upstream_class()(groups, **recipe.constructor))
    send = bare_messages(sum(one.numel() for one in held), layout, device)

    def step() -> None:
        upstream.step()
        send()

    return step


def placed(model: nn.Module, layout: str, device: torch.device) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh(device.type, (num_ranks(),))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def shares(
    taken: Sequence[tuple[Sample, Sample]], stock: Sequence[tuple[Sample, Sample]], floors: Sequence[Sample]
) -> dict[str, float]:
    """Medians in milliseconds of processor time, and shares of the whole step."""
    backward = statistics.median(one.processor_s for one, _ in taken)
    step = statistics.median(one.processor_s for _, one in taken)
    wall = statistics.median(one.wall_s + other.wall_s for one, other in taken)
    dearer = statistics.median(
        ours.processor_s - theirs.processor_s for (ours, _), (theirs, _) in zip(taken, stock, strict=True)
    )
    bound = statistics.median(one.processor_s for one in floors) if floors else None
    return {
        "backward_ms": round(1e3 * backward, 2),
        "step_ms": round(1e3 * step, 2),
        "wall_ms": round(1e3 * wall, 2),
        "share_of_step": round(step / (backward + step), 4),
        "share_with_backward": round((step + dearer) / (backward + step), 4),
        **({} if bound is None else {"bound": round(bound / (backward + bound), 4)}),
    }
