"""Any class, described by nobody: the trajectory that it has in one process, or a refusal before step 1."""

from __future__ import annotations

import functools
from dataclasses import replace
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
    change_rates,
    reference_of_engine,
    reference_run,
    reference_with_closure,
    run_given_gradients,
    run_under_zero,
    run_with_closure,
    weights_of,
)
from parity import full_parameters, gaps_between, gradients, inject, make_model, place
from torch import nn

import dist_optim
from dist_optim.errors import StateDictError
from dist_optim.layouts import detect
from dist_optim.specs.state_codec import encode
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


def equals_itself(name: str, placement: str, independent: bool | None, dtype: torch.dtype = torch.float32) -> None:
    has_scalar = placement == "none" or (placement == "ddp" and independent is not None)  # proven once for both
    case = replace(WITH_SCALAR if has_scalar else CASE, dtype=dtype)
    expected = reference_run(case, trap(name))
    problems, _ = run_given_gradients(case, trap(name), expected, placement, independent=independent)
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", [kind.__name__ for kind in TRAPS])
def test_whole_at_one_owner(two_ranks: RankPool, name: str, placement: str) -> None:
    two_ranks.run(equals_itself, name, placement, False)


@pytest.mark.parametrize("name", ["PullsToStart", "ClipsTogether", "DrawsNoise", "KeepsAttributes", "FollowsDistance"])
def test_replicas_of_shards_step_alike(four_ranks: RankPool, name: str) -> None:
    four_ranks.run(equals_itself, name, "hsdp", False)


def moved_by_a_checkpoint(name: str, directory: str) -> None:
    """Saved under DDP by the one rank that steps, loaded under FSDP2 where each steps a part."""
    expected = reference_run(CASE, trap(name))
    model = place(make_model(CASE), "ddp")
    optimizer = build(model, name, independent=False)
    for step in range(5):
        take_step(model, optimizer, step)
    dist_optim.save_checkpoint(directory, model, optimizer)
    second = place(make_model(CASE), "fsdp2 units")
    resumed = build(second, name, independent=True)
    dist_optim.load_checkpoint(directory, second, resumed)
    for step in range(5, CASE.steps):
        take_step(second, resumed, step)
    gaps = gaps_between(expected.weights[-1], full_parameters(second), "in the end")
    assert_no_problems_on_any_rank([str(gap) for gap in gaps if gap.absolute != 0])


def build(model: nn.Module, name: str, **options: Any) -> dist_optim.DistributedOptimizer:
    placed = detect(model).values()
    matrices = [one.parameter for one in placed if len(one.shape) > 1]
    others = [one.parameter for one in placed if len(one.shape) <= 1]
    groups: Any = [{"params": matrices, "lr": 0.02}, {"params": others}]
    return dist_optim.build_optimizer(model, trap(name).load(), params=groups, print_audit=False, **options)


def take_step(model: nn.Module, optimizer: dist_optim.DistributedOptimizer, step: int) -> None:
    inject(model, gradients(CASE, make_model(CASE), step))
    change_rates(optimizer, step)
    optimizer.step()


@pytest.mark.parametrize("name", ["KeepsAttributes", "NestedState", "PullsToStart", "DecaysItsRate"])
def test_a_checkpoint_moves_from_one_owner_to_many(two_ranks: RankPool, name: str, tmp_path: Path) -> None:
    two_ranks.run(moved_by_a_checkpoint, name, str(tmp_path / "saved"))


def refused_where_it_does_not_fit(directory: str) -> None:
    model = place(make_model(CASE), "ddp")
    optimizer = build(model, "SlowWeights", independent=False)
    for step in range(4):
        take_step(model, optimizer, step)
    dist_optim.save_checkpoint(directory, model, optimizer)
    apart = build(model, "SlowWeights", independent=True)
    before, weights = repr(apart.state_share()), weights_of(model)
    with pytest.raises(StateDictError, match="independent=False"):
        dist_optim.load_checkpoint(directory, model, apart)
    assert repr(apart.state_share()) == before
    assert all(torch.equal(one, weights[name]) for name, one in weights_of(model).items())


def test_what_one_rank_kept_of_all_tensors_is_refused_where_many_step(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(refused_where_it_does_not_fit, str(tmp_path / "saved"))


@pytest.mark.parametrize("placement", ["ddp", "fsdp2 units"])
@pytest.mark.parametrize("name", [kind.__name__ for kind in TRAPS])
def test_as_it_is_proven(two_ranks: RankPool, name: str, placement: str) -> None:
    two_ranks.run(equals_itself, name, placement, None)


@pytest.mark.parametrize("name", ["KeepsAlias", "WarmsMomentum", "ClipsLate", "TakesMissingAsZero"])
def test_in_half_precision(two_ranks: RankPool, name: str) -> None:
    two_ranks.run(equals_itself, name, "fsdp2 units", None, torch.bfloat16)


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


@pytest.mark.parametrize("kind", [set, frozenset])
def test_equal_sets_are_stored_alike(kind: type) -> None:
    """A set has its order from how it came about, and of strings from the process: ranks would differ."""
    one, other = kind([0, 8]), kind([8, 0])
    assert one == other and list(one) != list(other)
    assert encode(one, "", {}) == encode(other, "", {}) == {kind.__name__: [0, 8]}
