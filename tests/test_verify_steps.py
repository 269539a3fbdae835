"""``verify_steps``: the first steps of a run are compared with upstream alone, and what differs is said."""

from __future__ import annotations

import contextlib
import io
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from cases import all_cases
from parity import Case, build_subject, make_model, take_step
from placements import inject, place
from test_negative_controls import one_owner_lacks_the_others_gradients, updates_do_not_travel_back
from test_trainer_stock import NO_DECAY
from test_verify import Scaled
from trainers import Job, arguments_of, fresh_accelerate, train
from zero import GALORE, ZeroRun, engine_of, train_engine
from zero import NO_DECAY as ZERO_NO_DECAY

import dist_optim
from dist_optim.errors import HyperparameterError, UnsupportedError, UsageError
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.checks import check_verified_by_engine
from dist_optim.testing import RankPool
from dist_optim.verifying.shadow import VerifiedSteps

CASES = {case.name: case for case in reversed(all_cases())}
NAMES = {
    "ddp": ("schedule_free_adamw", "lomo"),
    "fsdp1": ("grokadamw", "adamw_torch"),
    "fsdp2 units": ("galore_adamw", "apollo_adamw"),
}
Said = tuple[str, int, bool]
"""What was printed, steps compared, whether a difference was found."""


def a_run(case: Case, placement: str, num_steps: int = 3, **options: Any) -> Said:
    model = place(make_model(case), placement)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        optimizer = build_subject(case, model, verify_steps=num_steps, fused_backward=False, **options)
        optimizer.train()
        for step in range(num_steps + 1):
            take_step(case, model, optimizer, step)
    verified: Any = optimizer.verified_steps
    assert verified.is_over and verified._reference is None
    return said.getvalue(), verified.num_compared, verified.difference is not None


@pytest.mark.parametrize("placement", NAMES)
def test_the_first_steps_are_those_of_upstream(placement: str, two_ranks: RankPool) -> None:
    for name in NAMES[placement]:
        first, other = two_ranks.run(a_run, CASES[name], placement)
        assert "the first 3 steps: equal to upstream's" in first[0], first[0]
        assert first[1:] == other[1:] == (3, False) and not other[0]


def test_replicas_of_shards(four_ranks: RankPool) -> None:
    said = four_ranks.run(a_run, CASES["galore_adamw"], "hsdp")
    assert [one[1:] for one in said] == [(3, False)] * 4 and sum("equal to" in one[0] for one in said) == 1


def at_owners() -> Said:
    case = replace(CASES["galore_adamw"], frozen=(), without_gradient=())
    return a_run(case, "fsdp2 units", reduce_to_owner=True)


def test_gradients_that_lie_with_their_owners_are_read_there(two_ranks: RankPool) -> None:
    assert two_ranks.run(at_owners)[0][1:] == (3, False)


def of_masters() -> Said:
    case = replace(CASES["galore_adamw"], dtype=torch.bfloat16)
    return a_run(case, "fsdp2", master_weights=True)


def test_masters_are_stepped_as_masters(two_ranks: RankPool) -> None:
    assert two_ranks.run(of_masters)[0][1:] == (3, False)


def of_class() -> Said:
    torch.manual_seed(0)
    model, said = place(torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 9)), "fsdp2"), io.StringIO()
    with contextlib.redirect_stdout(said):
        optimizer = dist_optim.build_optimizer(model, Scaled, lr=0.1, verify_steps=2)
        for step in range(3):
            torch.manual_seed(step)
            full = {name: torch.randn(one.shape) for name, one in model.named_parameters()}
            inject(model, dict(full))
            optimizer.step()
    verified: Any = optimizer.verified_steps
    return said.getvalue(), verified.num_compared, verified.difference is not None


def test_a_class_without_a_name(two_ranks: RankPool) -> None:
    assert two_ranks.run(of_class)[0][1:] == (2, False)


def under_zero(run: ZeroRun) -> Said:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine = engine_of(run)
        train_engine(engine, run, range(3))
    verified: Any = engine.basic_optimizer.verified_steps
    assert verified.is_over
    return said.getvalue(), verified.num_compared, verified.difference is not None


ZERO_RUNS = [
    ZeroRun("galore_adamw", {"lr": 1e-2, **GALORE, "verify_steps": 2}, 2, real_batches=True),
    ZeroRun(
        "schedule_free_adamw", {"lr": 1e-2, "no_decay": ZERO_NO_DECAY, "verify_steps": 2}, 3, {"sub_group_size": 20_000}
    ),
    ZeroRun("adafactor", {"lr": 1e-2, "verify_steps": 2}, 1, config={"bf16": {"enabled": True}}, real_batches=True),
    ZeroRun("lomo", {"lr": 1e-2, "clip_grad_norm": 0.1, "verify_steps": 2}, 3, {"sub_group_size": 20_000}),
    ZeroRun("sgd", {"lr": 1e-2, "verify_steps": 2}, 0),
]


@pytest.mark.parametrize("run", ZERO_RUNS, ids=lambda run: f"{run.name} zero{run.stage}")
def test_under_deepspeed(run: ZeroRun, two_ranks: RankPool) -> None:
    first, other = two_ranks.run(under_zero, run)
    assert first[1:] == other[1:] == (2, False), first[0]
    assert "the first 2 steps: equal to upstream's" in first[0] and "verify_steps" not in other[0]


def a_defect_under_zero(run: ZeroRun) -> Said:
    with mock.patch("dist_optim.stepping.step.scatter_from_owner", updates_do_not_travel_back):
        return under_zero(run)


def test_a_difference_under_deepspeed_is_found(two_ranks: RankPool) -> None:
    first, other = two_ranks.run(a_defect_under_zero, ZERO_RUNS[0])
    assert first[2] and other[2] and "DIFFERENT from upstream's galore_adamw" in first[0]


# What is found ------------------------------------------------------------------------------------------------------


def with_defect(placement: str, where: str, defect: Any) -> Said:
    with mock.patch(f"dist_optim.stepping.{where}", defect):
        return a_run(CASES["galore_adamw"], placement)


@pytest.mark.parametrize(
    ("placement", "where", "defect"),
    [
        ("fsdp2", "at_owner.gather_to_owner", one_owner_lacks_the_others_gradients),
        ("fsdp2", "step.scatter_from_owner", updates_do_not_travel_back),
        ("ddp", "step.scatter_from_owner", updates_do_not_travel_back),
    ],
)
def test_a_difference_is_found_by_all_and_said_once(
    placement: str, where: str, defect: Any, two_ranks: RankPool
) -> None:
    first, other = two_ranks.run(with_defect, placement, where, defect)
    assert first[2] and other[2] and not other[0]
    assert "verify_steps: DIFFERENT from upstream's galore_adamw in one process" in first[0]


# What ends it early, and what is refused ---------------------------------------------------------------------------


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def a_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_a_run_that_goes_on_says_that_it_was_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    model = linear()
    before = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1)
    a_step(model, before)
    after = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, verify_steps=2)
    after.load_state_dict(before.state_dict())
    a_step(model, after)
    assert "nothing was compared: state was loaded" in capsys.readouterr().out


def test_a_group_that_is_added_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(linear(), linear())
    optimizer = dist_optim.build_optimizer(model, "sgd", params=list(model[0].parameters()), lr=0.1, verify_steps=3)
    a_step(model[0], optimizer)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    a_step(model, optimizer)
    assert "the first step: equal to upstream's sgd" in capsys.readouterr().out


def test_weights_that_somebody_sets_between_steps_are_where_both_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = linear()
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, verify_steps=2)
    a_step(model, optimizer)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer.param_groups[0]["lr"] = 0.01
    a_step(model, optimizer)
    assert "the first 2 steps: equal" in capsys.readouterr().out


def test_random_numbers_of_the_run_are_as_without_it() -> None:
    def drawn(num_steps: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        random.seed(0)
        model = linear()
        optimizer = dist_optim.build_optimizer(model, "kron", lr=0.1, verify_steps=num_steps, print_audit=False)
        for _ in range(2):
            a_step(model, optimizer)
        return random.random(), torch.rand(1), model.weight.detach()

    with_it, without = drawn(2), drawn(0)
    assert with_it[0] == without[0] and torch.equal(with_it[1], without[1]) and torch.equal(with_it[2], without[2])


def test_what_cannot_be_verified_is_refused_when_it_is_built() -> None:
    with pytest.raises(UnsupportedError, match="dist-optim verify"):
        dist_optim.build_optimizer(linear(), "sgd", lr=0.1, fused_backward=True, verify_steps=1)
    with pytest.raises(HyperparameterError, match="verify_steps=-1 is not a whole number"):
        dist_optim.build_optimizer(linear(), "sgd", lr=0.1, verify_steps=-1)


def test_a_closure_that_upstream_evaluates_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = linear()
    optimizer = dist_optim.build_optimizer(model, torch.optim.LBFGS, lr=0.1, verify_steps=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert "nothing was compared: the class is given a closure" in capsys.readouterr().out


def test_the_shadow_is_of_its_own() -> None:
    """Negative control: a shadow that shares tensors with the run would find nothing."""
    model = linear()
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, verify_steps=1, print_audit=False)
    verified = optimizer.verified_steps
    assert isinstance(verified, VerifiedSteps) and verified._reference is not None
    mine = {one.data_ptr() for one in model.parameters()}
    assert not mine & {one.data_ptr() for one in verified._reference.reference.parameters.values()}


# Doors --------------------------------------------------------------------------------------------------------------


def through_the_trainer(directory: Path, strategy: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(Job("adamw_torch", NO_DECAY), strategy, directory, verify_steps=2)
    return said.getvalue()


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_the_trainer_takes_it_as_an_argument(strategy: str, tmp_path: Path, two_ranks: RankPool) -> None:
    first, other = two_ranks.run(through_the_trainer, tmp_path, strategy)
    assert "the first 2 steps: equal to upstream's adamw_torch" in first and "verify_steps" not in other


def test_the_trainer_refuses_it_for_an_optimizer_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="verify_steps=2: this optimizer is stepped as it was made"):
        train(Job("adamw_torch", kind=MakesItsOwn), "alone", tmp_path, verify_steps=2)
    with pytest.raises(UsageError, match="verify_steps -1 is out of range"):
        train(Job("adamw_torch", NO_DECAY), "alone", tmp_path, verify_steps=-1)


class MakesItsOwn(Trainer):
    """A Trainer that makes torch's optimizer itself."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


def test_accelerate_takes_it_as_a_keyword(capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_accelerate():
        model, optimizer, _ = prepare(Accelerator(cpu=True), linear(), "adamw_torch", lr=0.1, verify_steps=1)
        a_step(model, optimizer)
    assert "the first step: equal to upstream's adamw_torch" in capsys.readouterr().out


def test_the_argument_reaches_an_optimizer_that_deepspeeds_json_names(tmp_path: Path) -> None:
    with fresh_accelerate():
        trainer = Trainer(linear(), arguments_of(Job("adamw_torch"), "alone", tmp_path, verify_steps=3))
        trainer._named_in_json = ("sgd", {"lr": 0.1})
        assert trainer.create_optimizer().hyperparameters == {"lr": 0.1, "verify_steps": 3}


def test_an_optimizer_of_deepspeeds_own_is_refused() -> None:
    theirs = [linear(), torch.optim.SGD(linear().parameters(), lr=0.1)]
    with pytest.raises(UnsupportedError, match="verify_steps=2"):
        check_verified_by_engine(SimpleNamespace(verify_steps=2), theirs)
    check_verified_by_engine(SimpleNamespace(verify_steps=0), theirs)
