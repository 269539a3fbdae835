"""One rank of many on this machine alone, over torch's ``fake`` backend: what grows with their number.

Collectives of the fake backend return at once and move nothing: what is left is the work of the rank itself. Tensors
are small, so that it is mostly Python's. ``benchmarks/scale.py`` runs each rank as a process of its own.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import dist_optim
from measuring.counting import traffic_counted

__all__ = ["Figures", "measure_rank"]

WIDTH = 64
STEPS = 5
Figures = dict[str, Any]


def measure_rank(world_size: int, rank: int, optimizer: str, num_tensors: int) -> Figures:
    """Start up, take a few steps, and say what they took."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_tensors)))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (world_size,)))
    memory = resident_bytes()
    start = time.process_time()
    built = dist_optim.build_optimizer(model, optimizer, lr=1e-3, print_audit=False, **OPTIONS.get(optimizer, {}))
    start_up_s = time.process_time() - start
    give_gradients(model)
    first = time.process_time()
    built.step()
    first = time.process_time() - first
    durations = [duration_of_step(model, built) for _ in range(STEPS)]
    give_gradients(model)
    with traffic_counted() as traffic:
        built.step()
    return {
        "world_size": world_size,
        "rank": rank,
        "busiest_rank": busiest_rank(built),
        "start_up_s": round(start_up_s, 3),
        "first_step_ms": round(1e3 * first, 1),
        "step_ms": round(1e3 * statistics.median(durations), 1),
        "calls": calls_of_step(model, built),
        "collectives": sum(traffic.collectives.values()),
        "rounds": len(built.plan.buckets),
        "memory_bytes": resident_bytes() - memory,
        "audit_characters": len(built.route_audit()),
    }


OPTIONS: dict[str, dict[str, Any]] = {"stable_adamw": {"triton": False}}


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def duration_of_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of processor time."""
    give_gradients(model)
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def calls_of_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Functions that Python calls."""
    give_gradients(model)
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        calls[event] += 1

    sys.setprofile(note)
    optimizer.step()
    sys.setprofile(None)
    return calls["call"] + calls["c_call"]


def busiest_rank(optimizer: dist_optim.DistributedOptimizer) -> int:
    """The owner of most elements; 0 where nothing is owned."""
    owned: Counter[int] = Counter()
    placed = optimizer.placed_parameters()
    for index, owner in optimizer.plan.owners.items():
        owned[owner] += placed[index].shape.numel()
    return max(owned, key=lambda owner: (owned[owner], -owner), default=0)


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
