"""Any class, described by nobody: the trajectory that it has in one process, or a refusal before step 1."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from any_classes import (
    TRAPS,
    Ascends,
    ClipsTogether,
    DecaysItsRate,
    DrawsNoise,
    FollowsLoss,
    KeepsAttributes,
    PullsToStart,
)
from parity import Case, differences, full_parameters, gradients, inject, make_model, place
from torch import Tensor, nn
from torch.optim import Optimizer

import dist_optim
from dist_optim.layouts import detect
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

PLACEMENTS = ("ddp", "fsdp2 units", "fsdp1")
CASE = Case("any", torch.optim.SGD, {}, linear=((7, 5), (5, 7), (3, 8), (1, 6)), extra=((3,), (1,), (9, 4)))
"""Odd sizes, and fewer rows than ranks."""
WITH_SCALAR = replace(CASE, extra=((), *CASE.extra))
"""With a parameter without dims, which FSDP does not take."""


def draw_alike() -> None:
    torch.manual_seed(5)
    random.seed(5)


def case_for(placement: str) -> Case:
    return CASE if "fsdp" in placement else WITH_SCALAR


def reference_run(case: Case, kind: type[Optimizer]) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Weights after every step of the class alone, and its groups in the end."""
    model = make_model(case)
    draw_alike()
    optimizer = kind(plain_groups(model))  # type: ignore[call-arg]
    history = []
    for step in range(case.steps):
        for name, gradient in gradients(case, model, step).items():
            dict(model.named_parameters())[name].grad = gradient
        change_rates(optimizer, step)
        optimizer.step()
        history.append({name: one.detach().clone() for name, one in model.named_parameters()})
    return history, shown(optimizer)


def plain_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.ndim > 1], "lr": 0.02},
        {"params": [one for one in parameters if one.ndim <= 1]},
    ]


def change_rates(optimizer: Optimizer, step: int) -> None:
    """A schedule that acts now and then: in between, what the class writes itself stays."""
    if step % 3 == 1:
        for group in optimizer.param_groups:
            group["lr"] *= 0.7


def shown(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def build(model: nn.Module, kind: type[Optimizer], **options: Any) -> dist_optim.DistributedOptimizer:
    placed = detect(model).values()
    groups: list[dict[str, Any]] = [
        {"params": [one.parameter for one in placed if len(one.shape) > 1], "lr": 0.02},
        {"params": [one.parameter for one in placed if len(one.shape) <= 1]},
    ]
    return dist_optim.build_optimizer(model, kind, params=groups, print_audit=False, **options)


def equals_itself(kind: type[Optimizer], placement: str, independent: bool | None) -> None:
    case = case_for(placement)
    expected, groups = reference_run(case, kind)
    template, model = make_model(case), place(make_model(case), placement)
    draw_alike()
    optimizer = build(model, kind, independent=independent)
    problems = []
    for step in range(case.steps):
        if step == case.steps // 2:
            model, optimizer = again(model, optimizer, kind, placement, independent)
        inject(model, gradients(case, template, step))
        change_rates(optimizer, step)
        optimizer.step()
        problems += differences(case, expected[step], full_parameters(model), f"after step {step}")
    if shown(optimizer) != groups:
        problems.append(f"groups are {shown(optimizer)}, not {groups}")
    assert_no_problems_on_any_rank(problems[:5])


def again(
    model: nn.Module,
    optimizer: dist_optim.DistributedOptimizer,
    kind: type[Optimizer],
    placement: str,
    independent: bool | None,
) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    """Saved, and loaded into a fresh model and a fresh optimizer."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    states = torch.get_rng_state(), random.getstate()
    second = place(make_model(case_for(placement)), placement)
    resumed = build(second, kind, independent=independent)
    with torch.no_grad():
        for old, new in zip(model.parameters(), second.parameters(), strict=True):
            new.copy_(old)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    return second, resumed


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", TRAPS, ids=lambda kind: kind.__name__)
def test_whole_at_one_owner(two_ranks: RankPool, kind: type[Optimizer], placement: str) -> None:
    two_ranks.run(equals_itself, kind, placement, False)


@pytest.mark.parametrize("kind", TRAPS, ids=lambda kind: kind.__name__)
def test_in_one_process(kind: type[Optimizer]) -> None:
    equals_itself(kind, "none", None)


class Regression(nn.Module):
    """A loss that is not quadratic in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(given))).square().mean()
        return out


def batch(step: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def trained_with_closure(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> list[float]:
    def closure_of(step: int) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(batch(step))
            loss.backward()
            return loss

        return closure

    return [float(optimizer.step(closure_of(step)).detach()) for step in range(steps)]


CLOSURES: tuple[tuple[type[Optimizer], dict[str, Any]], ...] = (
    (torch.optim.LBFGS, {"lr": 0.1, "line_search_fn": "strong_wolfe", "max_iter": 5}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
    (Ascends, {"lr": 0.1}),
    (FollowsLoss, {"lr": 0.1}),
)


def equals_itself_with_closure(kind: type[Optimizer], arguments: dict[str, Any], placement: str) -> None:
    torch.manual_seed(0)
    plain = Regression()
    expected = trained_with_closure(plain, kind(plain.parameters(), **arguments))
    torch.manual_seed(0)
    model = place(Regression(), placement)
    optimizer = dist_optim.build_optimizer(model, kind, print_audit=False, **arguments)
    losses = trained_with_closure(model, optimizer)
    problems = [] if losses == expected else [f"losses {losses}, not {expected}"]
    weights = {name: one.detach() for name, one in plain.named_parameters()}
    problems += differences(CASE, weights, full_parameters(model), "in the end")
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("kind", "arguments"), CLOSURES, ids=["LBFGS with a search", "LBFGS", "Ascends", "FollowsLoss"]
)
def test_closures_are_evaluated_by_all_ranks(
    two_ranks: RankPool, kind: type[Optimizer], arguments: dict[str, Any], placement: str
) -> None:
    two_ranks.run(equals_itself_with_closure, kind, arguments, placement)


@pytest.mark.parametrize(
    ("kind", "arguments"), CLOSURES, ids=["LBFGS with a search", "LBFGS", "Ascends", "FollowsLoss"]
)
def test_closures_in_one_process(kind: type[Optimizer], arguments: dict[str, Any]) -> None:
    equals_itself_with_closure(kind, arguments, "none")


class Losses(nn.Module):
    """A model whose output is its loss, of one size for DeepSpeed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Regression()

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.inner(given)
        return out


def equals_itself_under_zero(kind: type[Optimizer], stage: int, independent: bool | None, directory: str) -> None:
    from zero import deepspeed

    from dist_optim.integrations.deepspeed.engine import build_optimizer_for_engine

    def engine_of() -> Any:
        model = Losses()
        client = build_optimizer_for_engine(model, kind, independent=independent, print_audit=False)
        config = {
            "train_micro_batch_size_per_gpu": 6,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        return package.initialize(model=model, optimizer=client, config=config)[0], client

    def train(engine: Any, steps: range) -> None:
        for step in steps:
            engine.backward(engine(batch(step)))
            engine.step()

    package = deepspeed()
    plain = Losses()
    draw_alike()
    alone = kind(plain.parameters())  # type: ignore[call-arg]
    for step in range(6):
        plain.zero_grad()
        plain(batch(step)).backward()
        alone.step()
    engine, client = engine_of()
    client.attach(engine)
    draw_alike()
    train(engine, range(3))
    engine.save_checkpoint(directory)
    states = torch.get_rng_state(), random.getstate()
    engine, client = engine_of()
    client.attach(engine)
    engine.load_checkpoint(directory)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    train(engine, range(3, 6))
    with package.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {name: one.detach().clone() for name, one in engine.module.named_parameters()}
    expected = {name: one.detach() for name, one in plain.named_parameters()}
    problems = differences(CASE, expected, weights, "in the end")
    shown_there = {key: client.param_groups[0].get(key) for key in shown(alone)[0]}
    problems += [] if shown_there == shown(alone)[0] else [f"groups are {shown_there}, not {shown(alone)}"]
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("kind", "independent"),
    [(PullsToStart, None), (DecaysItsRate, None), (DrawsNoise, None), (KeepsAttributes, None), (ClipsTogether, None)],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_under_zero(
    two_ranks: RankPool, kind: type[Optimizer], independent: bool | None, stage: int, tmp_path: Path
) -> None:
    two_ranks.run(equals_itself_under_zero, kind, stage, independent, str(tmp_path))
