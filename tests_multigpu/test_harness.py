"""The ranks of this run are together, on the devices they should be on, and reach the same result."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from dist_optim.testing import assert_equal, assert_no_problems_on_any_rank, max_abs_difference


def test_every_launched_rank_is_in_the_group() -> None:
    assert dist.get_world_size() == int(os.environ.get("WORLD_SIZE", "1"))
    assert dist.get_rank() == int(os.environ.get("RANK", "0"))


def test_backend_fits_the_device(device: torch.device) -> None:
    assert dist.get_backend() == {"cuda": "nccl", "cpu": "gloo"}[device.type]
    if device.type == "cuda":
        assert torch.cuda.current_device() == device.index


def test_all_reduce_sums_over_ranks(device: torch.device) -> None:
    total = torch.full((3,), float(dist.get_rank()), device=device)
    dist.all_reduce(total)
    world_size = dist.get_world_size()
    assert_equal(total, torch.full((3,), world_size * (world_size - 1) / 2, device=device))


def test_no_two_ranks_share_a_gpu(device: torch.device) -> None:
    devices: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(devices, (os.uname().nodename, str(device)))
    problems = []
    if device.type == "cuda" and len(set(devices)) < len(devices):
        problems.append(f"devices by rank: {devices}")
    assert_no_problems_on_any_rank(problems)


def test_broadcast_weights_are_bitwise_equal(device: torch.device) -> None:
    torch.manual_seed(dist.get_rank())
    weights = torch.randn(5, 7, device=device)
    dist.broadcast(weights, src=0)
    gathered = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, weights)
    assert max_abs_difference(gathered, [weights] * len(gathered)) == 0.0
