"""What a save and a load cost, counted: collectives, bytes that a rank receives, memory. Nothing here is timed."""

from __future__ import annotations

import itertools
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import place
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import dist_optim
from dist_optim.checkpoint import optimizer_content, wait_for_saves
from dist_optim.ranks.agreement import gather_objects
from dist_optim.testing import RankPool

LAYERS, WIDTH = 8, 256
TENSOR = 4 * WIDTH * WIDTH
"""Bytes of the largest tensor: what a save may have in memory twice."""
SAVED = 3 * LAYERS * TENSOR


def run(placement: str) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    torch.manual_seed(0)
    model = place(nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))), placement)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, print_audit=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


class Traffic(TorchDispatchMode):
    """Collectives of this rank, and the bytes that they bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.received = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count += 1
            self.received += sum(one.nbytes for one in tensors_in(args[0]))  # where results go
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def traffic_of(placement: str, folder: Path) -> list[tuple[int, int]]:
    """Of a save, and of a load."""
    model, optimizer = run(placement)
    found = []
    acts: list[Callable[..., Any]] = [dist_optim.save_checkpoint, dist_optim.load_checkpoint]
    for act in acts:
        act(folder, model, optimizer) if act is acts[0] else None  # what is made once is not counted
        with Traffic() as traffic:
            act(folder, model, optimizer)
        found.append((traffic.count, traffic.received))
    return found


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_traffic_grows_with_the_ranks_at_most_and_is_no_tensors(
    placement: str, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    by_two, by_four = (
        pool.run(traffic_of, placement, tmp_path / str(pool.world_size)) for pool in (two_ranks, four_ranks)
    )
    for act in range(2):
        (count,) = {rank[act][0] for rank in (*by_two, *by_four)}
        assert 0 < count < 100
        of_two, of_four = (max(rank[act][1] for rank in ranks) for ranks in (by_two, by_four))
        assert 0 < of_two < SAVED / 20 and of_four < SAVED / 20 and of_four <= 2.2 * of_two, (of_two, of_four)


def traffic_of_a_gathering_save(folder: Path) -> list[tuple[int, int]]:
    seal = optimizer_content.seal

    def gathering(directory: Path, ranks: Any) -> Any:
        gather_objects([torch.zeros(LAYERS, WIDTH, WIDTH)], ranks)
        return seal(directory, ranks)

    with mock.patch.object(optimizer_content, "seal", gathering):
        return traffic_of("fsdp2", folder)


def test_control_tensors_that_travel_are_seen(two_ranks: RankPool, tmp_path: Path) -> None:
    for (_, received), _ in two_ranks.run(traffic_of_a_gathering_save, tmp_path / "run"):
        assert received > SAVED / 20


def collectives_of_steps(folder: Path) -> list[int]:
    """Before an asynchronous save, after it, and once more."""
    model, optimizer = run("fsdp2")

    def step() -> int:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Traffic() as traffic:
            optimizer.step()
        return traffic.count

    step()
    before = step()
    dist_optim.save_checkpoint(folder, model, optimizer, asynchronous=True)
    wait_for_saves()
    return [before, step(), step()]


def test_steps_agree_on_a_save_until_all_know_its_end(two_ranks: RankPool, tmp_path: Path) -> None:
    for before, first, later in two_ranks.run(collectives_of_steps, tmp_path / "run"):
        assert first == before + 1 and later == before


def peak_of(act: Callable[[], Any]) -> int:
    """Bytes that are allocated at once, at most: of tensors, and of Python's objects."""
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        act()
        time.sleep(0.3)  # gloo's threads free what they have sent a moment later: the profiler must not end in between
    _, objects = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    results: Any = profiled.profiler.kineto_results
    events = sorted((one for one in results.events() if one.name() == "[memory]"), key=lambda one: one.start_ns())
    tensors = max(itertools.accumulate((one.nbytes() for one in events), initial=0))
    return objects + tensors


def peaks(placement: str, folder: Path) -> tuple[int, int, int]:
    """Of a save; of one with a copy, the control; and what this rank has of it all."""
    model, optimizer = run(placement)
    dist_optim.save_checkpoint(folder, model, optimizer)
    at_once = peak_of(lambda: dist_optim.save_checkpoint(folder, model, optimizer))

    def with_a_copy() -> None:
        dist_optim.save_checkpoint(folder, model, optimizer, asynchronous=True)
        wait_for_saves()

    share = SAVED // dist.get_world_size()
    beside = peak_of(with_a_copy)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return at_once, beside, share


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_a_save_has_one_tensor_in_memory_twice_at_most(placement: str, two_ranks: RankPool, tmp_path: Path) -> None:
    for at_once, beside, share in two_ranks.run(peaks, placement, tmp_path / "run"):
        assert at_once <= TENSOR + SAVED / 20, at_once
        assert share < beside <= share + TENSOR + SAVED / 20, beside
