"""torchtitan's contract, without torchtitan: built late, iterated over, hooked, and saved at any time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import all_cases
from parity import Case, Net, gradients, make_model, no_decay, reference_history, set_learning_rates
from placements import full_parameters, inject, place
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_optim.errors import UnsupportedError
from dist_optim.integrations.torchtitan import Config, OptimizersContainer
from dist_optim.testing import RankPool, assert_equal

CASE = {case.name: replace(case, without_gradient=()) for case in reversed(all_cases())}
"""Every parameter has a gradient at times: torch's checkpoints have no place for one that has never had state."""
HALF = 4


def built(case: Case, placement: str) -> tuple[nn.Module, OptimizersContainer]:
    model = place(make_model(case), placement)
    return model, config_of(case).build(model_parts=[model])


def take_steps(case: Case, model: nn.Module, container: OptimizersContainer, steps: range) -> None:
    for step in steps:
        inject(model, gradients(case, make_model(case), step))
        (optimizer,) = container
        set_learning_rates(optimizer, case, step)
        container.step()
        container.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())


def first_half(name: str, placement: str, folder: str) -> None:
    case = CASE[name]
    model, container = built(case, placement)
    assert len(container) == 1 and isinstance(LambdaLR(next(iter(container)), lambda step: 1.0), LambdaLR)
    calls: list[int] = []
    container.register_step_pre_hook(lambda *_: calls.append(1))
    before = container.state_dict()
    assert any(key.startswith("param_groups.linears.0.weight.") for key in before)
    assert not container.optimizers[0].num_steps, "reading took a step"
    take_steps(case, model, container, range(HALF))
    assert len(calls) == HALF
    saved = container.state_dict()
    assert saved.keys() == container.state_dict().keys() and container.optimizers[0].num_steps == HALF
    whole = full_parameters(model)
    dcp.save({"optimizer": saved, "weights": whole}, checkpoint_id=folder)
    assert_equal(whole, reference_history(case)[HALF - 1])


def second_half(name: str, placement: str, folder: str) -> None:
    case = CASE[name]
    weights = {key: torch.empty_like(one) for key, one in make_model(case).named_parameters()}
    dcp.load({"weights": weights}, checkpoint_id=folder)
    start: Net = make_model(case)
    start.load_state_dict(weights)
    model = place(start, placement)
    container = config_of(case).build(model_parts=[model])
    room = container.state_dict()
    dcp.load({"optimizer": room}, checkpoint_id=folder)
    container.load_state_dict(room)
    take_steps(case, model, container, range(HALF, case.steps))
    assert_equal(full_parameters(model), reference_history(case)[-1])


def config_of(case: Case) -> Config:
    options: dict[str, Any] = {**case.hyperparameters, **case.matrix, "no_decay": no_decay(make_model(case))}
    options |= {"target_modules": list(case.targets)} if case.matrix else {}
    return Config(name=case.name, options={**options, "print_audit": False})


@pytest.mark.parametrize("name", ["adamw_torch", "muon"])
def test_a_run_goes_on_under_another_sharding(
    name: str, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    four_ranks.run(first_half, name, "fsdp2 tp", str(tmp_path))
    two_ranks.run(second_half, name, "fsdp2 units", str(tmp_path))


def test_parts_of_a_pipeline_and_closures_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="2 parts, of a pipeline.*pipeline_parallel_degree to 1"):
        Config(name="sgd", options={"lr": 0.1}).build(model_parts=[nn.Linear(2, 2), nn.Linear(2, 2)])
    container = Config(name="sgd", options={"lr": 0.1, "print_audit": False}).build(model_parts=[nn.Linear(2, 2)])
    with pytest.raises(UnsupportedError, match="no closure"):
        container.step(lambda: 0.0)  # type: ignore[arg-type]
