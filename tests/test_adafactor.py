"""Adafactor's learning rates and its fp32 state: shown on plain upstream, and repaired or refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases.adafactor import CASES
from redeclared import run_on_local_slices
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import HyperparameterError
from dist_optim.testing import RankPool

Adafactor = pytest.importorskip("transformers.optimization").Adafactor


def model_with_gradients(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    return model


def build(model: nn.Module, **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(model, "adafactor", print_audit=False, **hyperparameters)


def test_defaults_are_those_of_the_trainer() -> None:
    group = build(nn.Linear(4, 3), lr=1e-3).param_groups[0]
    assert (group["scale_parameter"], group["relative_step"], group["lr"]) == (False, False, 1e-3)


def test_a_missing_rate_fails_inside_step_one_in_plain_upstream_and_is_refused_here() -> None:
    plain = Adafactor(model_with_gradients().parameters(), relative_step=False)
    with pytest.raises(TypeError):
        plain.step()
    with pytest.raises(HyperparameterError, match="adafactor needs lr"):
        build(nn.Linear(4, 3))


def test_a_rate_next_to_relative_steps_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="exclude each other"):
        build(nn.Linear(4, 3), lr=1e-3, relative_step=True)
    with pytest.raises(HyperparameterError, match="warmup_init=True"):
        build(nn.Linear(4, 3), lr=1e-3, warmup_init=True)


def test_plain_upstream_ignores_the_rate_of_a_group_with_relative_steps_and_it_is_refused_here() -> None:
    small, large = model_with_gradients(), model_with_gradients()
    for model, rate in ((small, 1e-9), (large, 1e9)):
        Adafactor([{"params": [model.weight], "lr": rate}]).step()
    assert torch.equal(small.weight, large.weight)
    with pytest.raises(HyperparameterError, match="exclude each other"):
        build(small, relative_step=True, params=[{"params": [small.weight], "lr": 1e-3}])


def test_relative_steps_need_no_rate() -> None:
    model = model_with_gradients()
    before = model.weight.detach().clone()
    optimizer = build(model, relative_step=True, warmup_init=True)
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert "lr none" in optimizer.route_audit()


def test_fp32_state_of_bf16_weights_is_rounded_by_plain_load_and_kept_here() -> None:
    settings = {"lr": 1e-2, "scale_parameter": False, "relative_step": False}
    model = model_with_gradients(torch.bfloat16)
    plain = Adafactor(model.parameters(), **settings)
    plain.step()
    loaded = Adafactor(model.parameters(), **settings)
    loaded.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert plain.state[model.weight]["exp_avg_sq_row"].dtype is torch.float32
    assert loaded.state[model.weight]["exp_avg_sq_row"].dtype is torch.bfloat16

    ours = build(model, lr=1e-2)
    ours.step()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    resumed = build(model, lr=1e-2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    kept, saved = (o.state_dict()["state"]["weight"]["exp_avg_sq_row"] for o in (resumed, ours))
    assert kept.dtype is torch.float32 and torch.equal(kept, saved)


def test_a_closure_that_runs_backward_fails_in_plain_upstream_and_works_here() -> None:
    model = nn.Linear(4, 3)

    def closure() -> Tensor:
        loss: Tensor = model(torch.ones(4)).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="does not require grad"):
        Adafactor(model.parameters(), lr=1e-3, relative_step=False).step(closure)
    assert build(model, lr=1e-3).step(closure) > 0


def test_control_means_of_slices_are_noticed(two_ranks: RankPool) -> None:
    assert any(two_ranks.run(run_on_local_slices, CASES[0], "fsdp2"))
