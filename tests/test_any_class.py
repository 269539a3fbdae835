"""Any class, described by nobody: the trajectory that it has in one process, or a refusal before step 1."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from any_classes import TRAPS, AscendsInTwoCalls, FollowsLoss
from any_runs import (
    CASE,
    WITH_SCALAR,
    Choice,
    Regression,
    batch,
    reference_of_engine,
    reference_run,
    reference_with_closure,
    run_given_gradients,
    run_under_zero,
    run_with_closure,
    weights_of,
)
from parity import full_parameters, gaps_between, place
from torch import nn

import dist_optim
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

PLACEMENTS = ("ddp", "fsdp2 units", "fsdp1")
CLOSURES = {
    "LBFGS with a search": Choice("torch.optim", "LBFGS", {"lr": 0.1, "line_search_fn": "strong_wolfe", "max_iter": 5}),
    "LBFGS": Choice("torch.optim", "LBFGS", {"lr": 0.1, "max_iter": 3}),
    "Ascends": Choice("any_classes", "Ascends", {"lr": 0.1}),
    "FollowsLoss": Choice("any_classes", "FollowsLoss", {"lr": 0.1}),
}


def trap(name: str) -> Choice:
    return Choice("any_classes", name)


def equals_itself(name: str, placement: str, independent: bool | None) -> None:
    case = CASE if "fsdp" in placement else WITH_SCALAR
    expected = reference_run(case, trap(name))
    problems, _ = run_given_gradients(case, trap(name), expected, placement, independent=independent)
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", [kind.__name__ for kind in TRAPS])
def test_whole_at_one_owner(two_ranks: RankPool, name: str, placement: str) -> None:
    two_ranks.run(equals_itself, name, placement, False)


@pytest.mark.parametrize("placement", ["ddp", "fsdp2 units"])
@pytest.mark.parametrize("name", [kind.__name__ for kind in TRAPS])
def test_as_it_is_proven(two_ranks: RankPool, name: str, placement: str) -> None:
    two_ranks.run(equals_itself, name, placement, None)


@pytest.mark.parametrize("name", [kind.__name__ for kind in TRAPS])
def test_in_one_process(name: str) -> None:
    equals_itself(name, "none", None)


def equals_itself_with_closure(choice: Choice, placement: str) -> None:
    problems, _ = run_with_closure(choice, reference_with_closure(choice), placement)
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CLOSURES)
def test_closures_are_evaluated_by_all_ranks(two_ranks: RankPool, name: str, placement: str) -> None:
    two_ranks.run(equals_itself_with_closure, CLOSURES[name], placement)


@pytest.mark.parametrize("name", CLOSURES)
def test_closures_in_one_process(name: str) -> None:
    equals_itself_with_closure(CLOSURES[name], "none")


def trained_in_two_calls(model: nn.Module, optimizer: Any) -> None:
    for step in range(4):
        model(batch(step)).backward()
        optimizer.first_step(zero_grad=True)
        assert all(parameter.grad is None for parameter in model.parameters())
        model(batch(step)).backward()
        optimizer.second_step()
        optimizer.zero_grad()


def two_calls_equal_one_process(placement: str) -> None:
    plain = Regression()
    trained_in_two_calls(plain, AscendsInTwoCalls(plain.parameters(), lr=0.1))
    model = place(Regression(), placement)
    trained_in_two_calls(model, dist_optim.build_optimizer(model, AscendsInTwoCalls, lr=0.1, print_audit=False))
    gaps = gaps_between(weights_of(plain), full_parameters(model), "in the end")
    assert_no_problems_on_any_rank([str(gap) for gap in gaps if gap.absolute])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_a_step_of_two_methods(two_ranks: RankPool, placement: str) -> None:
    two_ranks.run(two_calls_equal_one_process, placement)


def equals_itself_under_zero(name: str, stage: int, directory: str) -> None:
    problems, _ = run_under_zero(trap(name), reference_of_engine(trap(name)), stage, directory)
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["PullsToStart", "DecaysItsRate", "DrawsNoise", "KeepsAttributes", "ClipsTogether"])
def test_under_zero(two_ranks: RankPool, name: str, stage: int, tmp_path: Path) -> None:
    two_ranks.run(equals_itself_under_zero, name, stage, str(tmp_path))


def test_a_part_of_several_gets_the_loss() -> None:
    plain, model = Regression(), Regression()
    follower, other = FollowsLoss(plain.first.parameters(), lr=0.1), torch.optim.SGD(plain.second.parameters(), lr=0.1)
    groups: Any = [{"params": "first.*", "optim": FollowsLoss, "lr": 0.1}, {"params": "*", "optim": "sgd", "lr": 0.1}]
    optimizer = dist_optim.build_optimizer(model, FollowsLoss, params=groups, print_audit=False)

    def loss_of(net: nn.Module, step: int) -> Any:
        net.zero_grad()
        loss = net(batch(step))
        loss.backward()
        return loss.detach()

    for step in range(3):
        loss = loss_of(plain, step)
        follower.step(functools.partial(torch.clone, loss))
        other.step()
        optimizer.step(functools.partial(loss_of, model, step))
    assert not [str(gap) for gap in gaps_between(weights_of(plain), weights_of(model), "in the end") if gap.absolute]
