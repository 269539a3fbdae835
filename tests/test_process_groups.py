"""Ranks may be in different numbers of process groups, by which torch names new ones: served.

Ranks that want different groups are refused, on all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from patience import PATIENCE_S
from placements import full_parameters, inject, own_group
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.errors import RanksDisagreeError, UnsupportedLayoutError
from dist_optim.ranks import agreement
from dist_optim.ranks.agreement import assert_same_ranks_meant, gather_objects
from dist_optim.testing import RankPool, assert_equal

OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "target_modules": "all-linear",
    "rank": 2,
    "print_audit": False,
}


def step(process_group: dist.ProcessGroup | None) -> None:
    model = DistributedDataParallel(nn.Linear(4, 4), process_group=process_group)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, print_audit=False, process_group=process_group)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def rank_0_has_one_more() -> None:
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    step(None)


def test_all_ranks_make_groups_whatever_else_they_are_in() -> None:
    with RankPool(2, timeout_s=PATIENCE_S) as pool:
        pool.run(rank_0_has_one_more)


def torch_would_wait(ranks: list[int]) -> bool:
    """Whether torch would name a group of these ranks alone differently on some of them. Collective of all."""
    names = gather_objects(dist.distributed_c10d._hash_ranks_to_str(ranks))
    return len({names[rank] for rank in ranks}) > 1


def rank_0_has_one_more_of_two_in_three() -> None:
    group = dist.new_group([0, 1])
    assert not torch_would_wait([0, 1]), "control"
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    assert torch_would_wait([0, 1])
    if dist.get_rank() < 2:
        step(group)
        step(group)  # with the groups that are there


def test_some_ranks_make_groups_whatever_else_they_are_in() -> None:
    with RankPool(3, timeout_s=PATIENCE_S) as pool:
        pool.run(rank_0_has_one_more_of_two_in_three)


def in_halves(model: nn.Module) -> nn.Module:
    """FSDP2 over tensor parallelism, on each half of the ranks. Collective of all of them, as meshes are."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half // 2, 2), mesh_dim_names=("half", "shard", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    return model


def halves_of_a_job_step() -> None:
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    ranks = list(range(rank // half * half, rank // half * half + half))
    torch.manual_seed(0)  # the halves are averaged by hand
    plain = nn.Sequential(nn.Linear(8, 8))
    model = in_halves(copy.deepcopy(plain))
    given: dict[str, Tensor | None] = {name: torch.randn(one.shape) for name, one in plain.named_parameters()}
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)
    assert torch_would_wait(list(range(half)))
    optimizer = dist_optim.build_optimizer(model, "galore_adamw", **OPTIONS)
    (group,) = {one.process_group for one in optimizer.holdings.placed}
    assert dist.get_process_group_ranks(group or dist.group.WORLD) == ranks
    alone = dist_optim.build_optimizer(plain, "galore_adamw", **OPTIONS, process_group=own_group())
    for one, its in ((model, optimizer), (plain, alone)):
        inject(one, given)
        its.step()
    for name, full in full_parameters(model).items():
        assert_equal(full, plain.get_parameter(name))


def test_meshes_over_parts_of_a_job() -> None:
    with RankPool(8, timeout_s=PATIENCE_S) as pool:
        pool.run(halves_of_a_job_step)


def an_axis_is_out_of_order() -> None:
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=DeviceMesh("cpu", [1, 0]))
    with pytest.raises(UnsupportedLayoutError, match=r"the ranks \[1, 0\], whose process group has them as \[0, 1\]"):
        dist_optim.build_optimizer(model, "galore_adamw", **OPTIONS)


def test_axes_out_of_order_are_refused(two_ranks: RankPool) -> None:
    two_ranks.run(an_axis_is_out_of_order)


def wants(ranks: Sequence[int]) -> None:
    """Rank 0 wants a group with the first ones, and no other does."""
    with pytest.raises(
        RanksDisagreeError, match=r"rank 0 are cut over the ranks \[0, 1\], and on rank 1 over no group"
    ):
        assert_same_ranks_meant(ranks if dist.get_rank() == 0 else ())
    assert_same_ranks_meant(ranks if dist.get_rank() in ranks else ())


def test_ranks_that_mean_different_groups_are_refused(four_ranks: RankPool) -> None:
    four_ranks.run(wants, [0, 1])


def what_torch_would_split() -> list[Any]:
    """Of a group of two ranks, and of one of all four, where a device is bound."""
    seen: list[Any] = []
    torchs: Any = dist.distributed_c10d
    with (
        mock.patch.object(torchs, "_get_split_source", lambda pg: "the communicator of all"),
        mock.patch.object(dist, "new_group", lambda *_, **__: seen.append(torchs._get_split_source(None))),
    ):
        agreement._new_group("work", [0, 1], None, None)
        agreement._new_group("work", [0, 1, 2, 3], None, None)
    return seen


def test_a_group_of_some_ranks_is_not_split_off_all_of_them(four_ranks: RankPool) -> None:
    """NCCL would wait for those that are not in it."""
    assert four_ranks.run(what_torch_would_split) == [[None, "the communicator of all"]] * 4
