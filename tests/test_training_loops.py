"""Training loops as people write them, each against one process on the same global batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from placements import full_parameters, own_group, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.testing import RankPool, relative_distance

STEPS = 6
NOISE = 1e-5
"""Relative to the distance moved: ten times what another order of summation is worth here, and far below a defect."""


class Regression(nn.Module):
    """Three odd layers, one of them frozen, and two tied matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in ((15, 21), (21, 15), (15, 21), (21, 15)))
        self.layers[2].weight = self.layers[0].weight
        self.layers[3].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum(1).mean()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return Regression()


def compiled_ddp() -> nn.Module:
    return place(torch.compile(make_model(), backend="eager"), "ddp")  # type: ignore[arg-type]


def offloaded_fsdp2() -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model()
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one process": make_model,
    "ddp static graph": lambda: place(make_model(), "ddp static"),
    "ddp of a compiled model": compiled_ddp,
    "fsdp2": lambda: place(make_model(), "fsdp2"),
    "fsdp2 with parameters offloaded": offloaded_fsdp2,
}


def train(kind: str, accumulate: int, alone: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    model = MODELS[kind]()
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=1e-2, process_group=alone, print_audit=False)
    rank, world_size = (0, 1) if alone is not None else (dist.get_rank(), dist.get_world_size())
    for step in range(STEPS):
        batch = torch.randn(24, 15, generator=torch.Generator().manual_seed(step))
        parts = batch.chunk(world_size)[rank].chunk(accumulate)
        for at, part in enumerate(parts):
            is_last = at == len(parts) - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last)
            elif isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = is_last
            (model(part) / len(parts)).backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [tensor for _, tensor in sorted(full_parameters(model).items())]


def distance(kind: str, accumulate: int) -> float:
    start = [p.detach().clone() for _, p in sorted(make_model().named_parameters())]
    return relative_distance(train(kind, accumulate), train("one process", accumulate, own_group()), start)


LOOPS = [(kind, accumulate) for kind in MODELS if kind != "one process" for accumulate in (1, 3)]
LOOPS.remove(("ddp static graph", 3))  # torch's static graphs take no backward pass without reduction


@pytest.mark.parametrize(("kind", "accumulate"), LOOPS)
def test_loop_ends_where_one_process_does(kind: str, accumulate: int, two_ranks: RankPool) -> None:
    assert max(two_ranks.run(distance, kind, accumulate)) < NOISE
