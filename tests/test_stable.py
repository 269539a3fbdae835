"""StableAdamW's choices and its compensation: shown on plain upstream, and repaired or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.stable import CASES
from redeclared import run_on_local_slices, run_with_empty_steps_left_out
from torch import nn

import dist_optim
from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.testing import RankPool

optimi = pytest.importorskip("optimi")

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where there is no GPU")


def model_with_gradients(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    return model


def build(model: nn.Module, **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(
        model, "stable_adamw", print_audit=False, **{"lr": 1e-2, "betas": (0.9, 0.95), **hyperparameters}
    )


@on_cpu
@pytest.mark.skipif(not optimi.utils.HAS_TRITON, reason="needs triton installed, which upstream then chooses")
def test_plain_upstream_chooses_triton_on_a_cpu_and_here_it_steps() -> None:
    with pytest.raises(RuntimeError):
        optimi.StableAdamW(model_with_gradients().parameters(), lr=1e-2).step()
    ours = model_with_gradients()
    before = ours.weight.detach().clone()
    build(ours).step()
    assert not torch.equal(ours.weight, before)


@on_cpu
def test_triton_on_a_cpu_is_refused_before_the_first_step() -> None:
    with pytest.raises(UnsupportedError, match="2 parameters 'weight', 'bias'.*GPU"):
        build(nn.Linear(4, 3), triton=True)


def test_a_switch_spelt_false_is_off() -> None:
    """transformers 5.23 reads optim_args with bool(), for which every string but the empty one is true."""
    given = dist_optim.parse_optim_args("kahan_sum=False, decouple_lr=False")
    optimizer = build(model_with_gradients(torch.bfloat16), **given)
    optimizer.step()
    assert optimizer.state_dict()["state"]["weight"]["kahan_comp"] is None
    assert optimizer.param_groups[0]["decouple_lr"] is False


def test_half_precision_weights_are_compensated_by_default() -> None:
    optimizer = build(model_with_gradients(torch.bfloat16))
    optimizer.step()
    assert optimizer.state_dict()["state"]["weight"]["kahan_comp"].dtype is torch.bfloat16


def test_upstream_ignores_betas_of_a_group_and_here_they_are_refused() -> None:
    model = model_with_gradients()
    plain = optimi.StableAdamW([{"params": [model.weight], "betas": (0.5, 0.6)}], lr=1e-2, triton=False)
    assert (plain.param_groups[0]["beta1"], plain.param_groups[0]["beta2"]) == (0.9, 0.99)
    with pytest.raises(HyperparameterError, match="one value of 'betas' for all groups"):
        build(model, params=[{"params": [model.weight], "betas": (0.5, 0.6)}])


def test_unset_hyperparameters_are_those_of_the_trainer() -> None:
    group = dist_optim.build_optimizer(nn.Linear(4, 3), "stable_adamw", lr=1e-2, print_audit=False).param_groups[0]
    assert (group["beta1"], group["beta2"], group["eps"], group["weight_decay"]) == (0.9, 0.999, 1e-8, 0.0)


def test_control_mean_squares_of_slices_are_noticed(two_ranks: RankPool) -> None:
    assert any(two_ranks.run(run_on_local_slices, CASES[0], "fsdp2"))


def test_control_counters_that_lag_in_some_rounds_are_noticed(two_ranks: RankPool) -> None:
    one_tensor_a_round = {"bucket_bytes": 1}
    assert any(two_ranks.run(run_with_empty_steps_left_out, CASES[0], "ddp", **one_tensor_a_round))
