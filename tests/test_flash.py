"""FlashOptim on CPU: what is refused, and upstream's defects beside what dist_optim makes of them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases.flash import CASES, PLAIN
from parity import build_subject, gradients, inject, make_model, place, run_case, take_step
from torch import nn

import dist_optim
from dist_optim.errors import HyperparameterError, StateDictError, UnsupportedError
from dist_optim.optimizers.flash import FlashDriver
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

NAMES = ("flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion")
ADAMW = CASES[0]
UNEVEN = ((67, 40), (2, 24))


def build(name: str, dtype: torch.dtype = torch.float32, **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    model = nn.Linear(4, 3, dtype=dtype)
    return dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **hyperparameters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("modes", "named"),
    [
        ({}, "quantize=True and fused=True and master_weight_bits=24 run Triton kernels"),
        ({**PLAIN, "fused": True}, "fused=True run Triton kernels"),
        ({**PLAIN, "master_weight_bits": 32}, "master_weight_bits=32 run Triton kernels"),
    ],
)
def test_every_mode_with_kernels_is_refused_without_cuda(name: str, modes: dict[str, Any], named: str) -> None:
    """Never another mode in its stead: the user asked for 8-bit state, and must learn that there is none here."""
    with pytest.raises(UnsupportedError, match=named) as caught:
        build(name, torch.bfloat16, **modes)
    assert "quantize=False, fused=False, master_weight_bits=None" in str(caught.value)


def build_default_modes() -> None:
    build_subject(replace(ADAMW, constructor={}), place(make_model(ADAMW), "fsdp2"))


def test_the_refusal_reaches_every_rank(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError) as caught:
        two_ranks.run(build_default_modes)
    assert len(re.findall(r"--- rank \d raised ---", str(caught.value))) == 2
    assert "UnsupportedError: flash_adamw" in str(caught.value)


def test_error_bits_of_an_fp32_model_are_refused_with_advice_that_helps() -> None:
    """Upstream says "omit master_weight_bits", but its default is 24: omitting it fails again."""
    with (
        mock.patch.object(FlashDriver, "runs_kernels_on", return_value=True),
        pytest.raises(HyperparameterError, match="all parameters are fp32. Pass master_weight_bits=None"),
    ):
        build("flash_adamw")


def test_fp64_is_refused_before_step_one() -> None:
    """Upstream meets a KeyError in its first step."""
    from flashoptim import FlashAdamW

    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KeyError):
        FlashAdamW([parameter], **PLAIN).step()
    with pytest.raises(UnsupportedError, match=r"fp32, bf16 and fp16 parameters, not torch\.float64"):
        build("flash_adamw", torch.float64, **PLAIN)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("flash_adamw", {"master_weight_bits": 16}),
        ("flash_lion", {"quantize": "yes"}),
        ("flash_sgd", {"decouple_lr": True}),
        ("flash_sgd", {**PLAIN, "nesterov": True}),
        ("flash_adam", {"betas": (0.9, 1.0)}),
    ],
)
def test_wrong_hyperparameters_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(HyperparameterError, match=name):
        build(name, **wrong)


def upstream_cannot_save_uneven_shards() -> list[str]:
    """Upstream wraps its state as DTensors and supports even shards only; ours is the same state by name."""
    from flashoptim import FlashAdamW

    case = replace(ADAMW, linear=UNEVEN, frozen=(), without_gradient=())
    model = place(make_model(case), "fsdp2")
    upstream = FlashAdamW(model.parameters(), **PLAIN)
    inject(model, gradients(case, make_model(case), 0))
    upstream.step()
    with pytest.raises(ValueError, match="evenly-sharded"):
        upstream.state_dict()
    ours = build_subject(case, model)
    take_step(case, model, ours, 0)
    state = ours.state_dict()["state"]
    return sorted(set(dict(make_model(case).named_parameters())) - set(state))


def test_state_of_uneven_shards_is_saved(two_ranks: RankPool) -> None:
    assert two_ranks.run(upstream_cannot_save_uneven_shards) == [[], []]


def step_counts() -> set[int]:
    case = replace(ADAMW, frozen=(), without_gradient=())
    model = place(make_model(case), "fsdp2")
    optimizer = build_subject(case, model)
    take_step(case, model, optimizer, 0)
    take_step(case, model, optimizer, 1)
    return {int(state["step"]) for state in optimizer.state_dict()["state"].values()}


def test_ranks_with_an_empty_part_count_the_same_steps(three_ranks: RankPool) -> None:
    """Upstream returns before counting where a parameter is empty: bias correction would restart after resharding."""
    assert three_ranks.run(step_counts) == [{2}, {2}, {2}]


def numerics_with_one_large_rank() -> str:
    """Rank 1 alone holds the weight that is too large for the learning rate."""
    case = replace(ADAMW, linear=((4, 8),), extra=(), frozen=(), without_gradient=())
    plain = make_model(case)
    with torch.no_grad():
        dict(plain.named_parameters())["linears.0.weight"].fill_(1e-3)[3, 3] = 1e9
    model = place(plain, "fsdp2")
    optimizer = build_subject(replace(case, constructor={**PLAIN, "check_numerics": True}), model)
    return "slices" if "local slices" in optimizer.route_audit() else "whole"


def test_numerics_are_checked_on_whole_tensors(two_ranks: RankPool) -> None:
    assert two_ranks.run(numerics_with_one_large_rank) == ["whole", "whole"]


def test_state_of_another_mode_is_refused() -> None:
    """Upstream takes the mode from the checkpoint, silently, and goes on in it."""
    optimizer = build("flash_adamw", torch.bfloat16, **PLAIN)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()

    with_error_bits = copy.deepcopy(saved)
    with_error_bits["state"]["weight"]["error_bits"] = torch.zeros(3, 4, dtype=torch.int8)
    with pytest.raises(StateDictError, match="1 bytes of error bits .* keeps 0"):
        build("flash_adamw", torch.bfloat16, **PLAIN).load_state_dict(with_error_bits)

    quantized = copy.deepcopy(saved)
    moment = quantized["state"]["weight"].pop("exp_avg")
    quantized["state"]["weight"] |= {
        "exp_avg::quantized": moment.to(torch.int8),
        "exp_avg::scales": torch.ones(1, dtype=torch.float16),
    }
    with pytest.raises(StateDictError, match="saved with quantize=True"):
        build("flash_adamw", torch.bfloat16, **PLAIN).load_state_dict(quantized)


def without_the_slices_of_rank_one() -> None:
    """Negative control: the elementwise path leaves out what rank 1 holds."""
    step = FlashDriver.step

    def step_on_rank_zero(self: FlashDriver, optimizer: Any, parameters: list[torch.Tensor]) -> None:
        if dist.get_rank() == 0:
            step(self, optimizer, parameters)

    with mock.patch.object(FlashDriver, "step", step_on_rank_zero):
        assert_no_problems_on_any_rank(run_case(ADAMW, "fsdp2"))


def test_parity_notices_slices_that_are_not_stepped(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="differs after step 0"):
        two_ranks.run(without_the_slices_of_rank_one)
