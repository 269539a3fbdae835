"""Ranks may be in different numbers of process groups, by which torch names new ones: served, or refused on all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.errors import RanksDisagreeError
from dist_optim.testing import RankPool


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
    with RankPool(2, timeout_s=60) as pool:
        pool.run(rank_0_has_one_more)


def rank_0_has_one_more_of_two_in_three() -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    if dist.get_rank() < 2:
        with pytest.raises(RanksDisagreeError, match="is in 3 groups and rank 1 is in 2"):
            step(group)


def test_some_ranks_in_different_numbers_are_refused() -> None:
    with RankPool(3, timeout_s=60) as pool:
        pool.run(rank_0_has_one_more_of_two_in_three)
