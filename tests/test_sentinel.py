"""The sentinel names the first tensor, step and rank that differ; rates that differ are refused at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import Net
from patience import PATIENCE_S
from placements import inject, place

import dist_optim
from dist_optim.errors import StepFailedError
from dist_optim.testing import RankFailure, RankPool


def run_with_fault(placement: str, fault: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = place(Net(((6, 4), (4, 6)), ((5, 3), (3,))), placement)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, print_audit=False, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        plain = Net(((6, 4), (4, 6)), ((5, 3), (3,)))
        inject(model, {name: torch.randn(p.shape, generator=generator) for name, p in plain.named_parameters()})
        if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            FAULTS[fault](optimizer)
        optimizer.step()


def change_learning_rate(optimizer: dist_optim.DistributedOptimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 1.5


def change_own_state(optimizer: dist_optim.DistributedOptimizer) -> None:
    for instance in optimizer.holdings.instances:
        for tensor in instance.state_tensors():
            if tensor.numel() > 1:
                tensor.view(-1)[0] += 1e-3
                return


FAULTS: dict[str, Callable[[dist_optim.DistributedOptimizer], None]] = {
    "lr": change_learning_rate,
    "state": change_own_state,
    "none": lambda optimizer: None,
}


def assert_all_raise(pool: RankPool, message: str, *arguments: Any) -> None:
    with pytest.raises(RankFailure) as failure:
        pool.run(run_with_fault, *arguments)
    assert failure.value.tracebacks
    for text in failure.value.tracebacks.values():
        assert re.search(message, text, flags=re.DOTALL), text


@pytest.mark.parametrize("placement", ["ddp", "fsdp2", "hsdp"])  # on two ranks: two replicas of one shard
def test_changed_learning_rate_is_refused_in_the_same_step(placement: str, two_ranks: RankPool) -> None:
    message = (
        "RanksDisagreeError: Hyperparameters differ between ranks: group 0, lr is 0.01 on rank 0 and 0.015 on rank 1"
    )
    assert_all_raise(two_ranks, message, placement, "lr", {})


@pytest.mark.parametrize("placement", ["hsdp", "fsdp1 hybrid"])
def test_changed_state_of_a_replica_is_named(placement: str, four_ranks: RankPool) -> None:
    message = r"RanksDisagreeError: After step 3, (parameter|state) .* on rank \d and .* on rank 3"
    assert_all_raise(four_ranks, message, placement, "state", {"check_ranks_every": 1})


def element_changed(check_every: int) -> int:
    """Rank 1 changes one element after step 2; returns the number of steps that went through."""
    torch.manual_seed(0)
    model = place(Net(((6, 4), (4, 6)), ((5, 3), (3,))), "ddp")
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=1e-2, print_audit=False, check_ranks_every=check_every)
    for step in range(6):
        inject(model, {name: None for name in [placed.fqn for placed in optimizer.holdings.placed]})
        if step == 2 and dist.get_rank() == 1:
            with torch.no_grad():
                optimizer.placed_parameters()[0].parameter.view(-1)[3] += 1e-6
        optimizer.step()
    return optimizer.num_steps


def test_changed_element_of_a_replicated_parameter_is_named_within_one_period(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="After step 4, parameter 'linears.0.weight'.* on rank 0 and .* on rank 1"):
        two_ranks.run(element_changed, 2)
    assert two_ranks.run(element_changed, 0) == [6, 6]  # without the sentinel nobody would notice


@pytest.mark.parametrize("placement", ["ddp", "fsdp2", "fsdp1"])
def test_sound_runs_pass(placement: str, two_ranks: RankPool) -> None:
    two_ranks.run(run_with_fault, placement, "none", {"check_ranks_every": 1})


def die_in_the_middle_of_a_step() -> None:
    model = place(Net(((6, 4), (4, 6)), ()), "fsdp2")
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=1e-2, print_audit=False)
    inject(model, {name: torch.ones(p.shape) for name, p in Net(((6, 4), (4, 6)), ()).named_parameters()})
    if dist.get_rank() == 1:
        import os

        os._exit(7)
    optimizer.step()


def test_rank_killed_in_the_middle_of_a_step_leaves_none_hanging() -> None:
    with RankPool(2, timeout_s=PATIENCE_S) as pool, pytest.raises(RankFailure, match="rank 1 .*7|exit"):
        pool.run(die_in_the_middle_of_a_step)


def step_with_nan() -> str:
    """GaLore's SVD raises on NaN, at the owner of the matrix alone."""
    model = place(Net(((6, 4), (4, 6)), ()), "ddp")
    options: dict[str, Any] = {"target_modules": "all-linear", "rank": 2}
    optimizer = dist_optim.build_optimizer(model, "galore_adamw", lr=1e-2, print_audit=False, **options)
    gradients = {name: torch.ones(p.shape) for name, p in Net(((6, 4), (4, 6)), ()).named_parameters()}
    inject(model, {**gradients, "linears.0.weight": torch.full((6, 4), torch.nan)})
    try:
        optimizer.step()
    except StepFailedError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_failure_of_upstream_at_one_owner_reaches_all_ranks_in_that_step(two_ranks: RankPool) -> None:
    raised = two_ranks.run(step_with_nan)
    (owner,) = [rank for rank, text in enumerate(raised) if "from rank" not in text]
    for text in raised:
        assert f"galore_adamw: step 1 failed on rank {owner} with _LinAlgError: linalg.svd" in text
