"""torchao's quantized AdamW: what upstream does to shards and arguments, and what dist_optim does instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases.torchao import CASES
from parity import Case, build_subject, full_parameters, gradients, inject, make_model, place, run_case, take_step
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import HyperparameterError, StateDictError, UnsupportedError
from dist_optim.testing import RankPool

ADAMW8 = next(case for case in CASES if case.name == "adamw_torch_8bit")
ADAMW4 = next(case for case in CASES if case.name == "adamw_torch_4bit")
# 6144 elements: quantized as a whole; a shard of two ranks has 3072, below the limit of 4096.
ONE_MATRIX: dict[str, Any] = {"linear": ((48, 128),), "extra": (), "frozen": (), "without_gradient": ()}


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def build(name: str, dtype: torch.dtype = torch.float32, **hyperparameters: Any) -> dist_optim.DistributedOptimizer:
    model = nn.Linear(64, 64, dtype=dtype)
    return dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **hyperparameters)


def step_once(optimizer: torch.optim.Optimizer) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


# The rule on size --------------------------------------------------------------------------------------------------


def upstream_on_shards(case: Case) -> tuple[str, float]:
    """Type of upstream's state of a sharded matrix, and how far its weights end from those of one process."""
    import torchao.optim

    upstream_class = torchao.optim.AdamW8bit if case.name == "adamw_torch_8bit" else torchao.optim.AdamW4bit
    with torch.compiler.set_stance("force_eager"):
        whole, sharded = make_model(case), place(make_model(case), "fsdp2")
        reference, upstream = upstream_class(whole.parameters(), lr=1e-2), upstream_class(sharded.parameters(), lr=1e-2)
        for step in range(case.steps):
            inject(whole, gradients(case, whole, step))
            inject(sharded, gradients(case, make_model(case), step))
            reference.step()
            upstream.step()
    (state, *_) = (upstream.state[p] for p in sharded.parameters() if p.ndim == 2)
    gap = (full_parameters(sharded)["linears.0.weight"] - full_parameters(whole)["linears.0.weight"]).abs().max().item()
    return type(state["exp_avg"].to_local()).__name__, gap


def our_state(case: Case) -> dict[str, Any]:
    with torch.compiler.set_stance("force_eager"):
        model = place(make_model(case), "fsdp2")
        optimizer = build_subject(case, model)
        take_step(case, model, optimizer, 0)
        return optimizer.state_dict()["state"].get("linears.0.weight", {})


@pytest.mark.parametrize("case", [ADAMW8, ADAMW4], ids=str)
def test_quantization_is_decided_on_the_whole_tensor(case: Case, two_ranks: RankPool) -> None:
    """Upstream counts the elements of the shard: quantized in one process, not quantized on two ranks."""
    case = replace(case, **ONE_MATRIX)
    for kind, gap in two_ranks.run(upstream_on_shards, case):
        assert kind == "Tensor" and gap > 1e-4
    (state,) = [state for state in two_ranks.run(our_state, case) if state]
    assert state["exp_avg.scale"].numel() == 48 * 128 / case.constructor["block_size"]


def shards_stepped_alone(case: Case) -> list[str]:
    """Negative control: every rank steps its own slice, as if the optimizer were elementwise."""

    def runs_locally(spec: Any, placed: Any, *_: Any) -> bool:
        return not placed.layout.is_replicated

    with mock.patch.object(dist_optim.stepping.division, "runs_on_local_slices", runs_locally):
        return run_case(case, "fsdp2")


@pytest.mark.parametrize("case", [ADAMW8, ADAMW4], ids=str)
def test_parity_notices_shards_stepped_alone(case: Case, two_ranks: RankPool) -> None:
    problems = [problem for of_rank in two_ranks.run(shards_stepped_alone, case) for problem in of_rank]
    assert any("linears.0.weight (64, 64)" in problem for problem in problems)


# Arguments ---------------------------------------------------------------------------------------------------------


def test_block_size_given_as_text_is_a_number() -> None:
    """transformers' Trainer hands the text on, and upstream fails in its first step."""
    from torchao.optim import AdamW8bit

    with pytest.raises(TypeError):
        step_once(AdamW8bit(nn.Linear(64, 64).parameters(), block_size="128"))
    step_once(build("adamw_torch_8bit", **dist_optim.parse_optim_args("block_size=128")))
    step_once(build("adamw_torch_8bit", block_size="128"))


def test_learning_rate_may_be_assigned() -> None:
    """Upstream keeps it as a tensor and raises when a schedule, or a user, puts a number in its place."""
    from torchao.optim import AdamW8bit

    upstream = AdamW8bit(nn.Linear(64, 64).parameters())
    upstream.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="non-Tensor"):
        step_once(upstream)
    optimizer = build("adamw_torch_8bit")
    (weight, *_) = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["lr"] = 0.0
    before = weight.detach().clone()
    step_once(optimizer)
    assert torch.equal(weight, before)
    optimizer.param_groups[0]["lr"] = 0.5
    step_once(optimizer)
    assert (before - weight).min() > 0.4


def test_amsgrad_is_refused_where_state_is_quantized() -> None:
    """Upstream fails in its first step, and only on the rank that owns the tensor."""
    from torchao.optim import AdamW8bit

    with pytest.raises(NotImplementedError, match="maximum"):
        step_once(AdamW8bit(nn.Linear(64, 64).parameters(), amsgrad=True))
    with pytest.raises(UnsupportedError, match="'weight': torchao .* amsgrad=False"):
        build("adamw_torch_8bit", amsgrad=True)
    step_once(build("adamw_torch_8bit", amsgrad=True, block_size=4097))  # nothing has whole blocks


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("adamw_torch_8bit", {"block_size": 0}, HyperparameterError),
        ("adamw_torch_8bit", {"block_size": "many"}, HyperparameterError),
        ("adamw_torch_8bit", {"optim_bits": 8}, HyperparameterError),
        ("adamw_torch_4bit", {"block_size": 129}, UnsupportedError),
    ],
)
def test_wrong_hyperparameters_are_refused(name: str, wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        build(name, **wrong)


def build_with_stochastic_rounding(dtype: torch.dtype) -> str:
    try:
        build("adamw_torch_8bit", dtype, bf16_stochastic_round=True)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_stochastic_rounding_is_refused_on_several_ranks(two_ranks: RankPool) -> None:
    """Its random numbers come from one stream over all parameters, which no rank with a share of them can follow."""
    assert build_with_stochastic_rounding(torch.bfloat16) == ""  # one process is upstream's own
    assert all("random generator" in told for told in two_ranks.run(build_with_stochastic_rounding, torch.bfloat16))
    assert two_ranks.run(build_with_stochastic_rounding, torch.float32) == ["", ""]  # without effect on fp32


# State -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_state_is_plain_tensors(name: str) -> None:
    optimizer = build(name, torch.bfloat16)
    step_once(optimizer)
    for state in optimizer.state_dict()["state"].values():
        assert {type(value) for value in state.values()} <= {Tensor, bool}
    weight = optimizer.state_dict()["state"]["weight"]
    assert weight["exp_avg.codes"].dtype == torch.uint8 and weight["exp_avg.scale"].dtype == torch.float32
    assert weight["exp_avg.signed"] and not weight["exp_avg_sq.signed"]


@pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_state_with_other_blocks_is_refused(name: str) -> None:
    """Upstream would go on with the blocks of the state."""
    optimizer = build(name, block_size=128)
    step_once(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(StateDictError, match="block_size=128, which is not what this optimizer's block_size=256"):
        build(name, block_size=256).load_state_dict(saved)
    with pytest.raises(StateDictError, match="block_size=128"):
        build(name, block_size=4100).load_state_dict(saved)


@pytest.mark.parametrize(("name", "bytes_an_element"), [("adamw_torch_8bit", 2.03), ("adamw_torch_4bit", 1.03)])
def test_state_bytes_are_as_listed(name: str, bytes_an_element: float) -> None:
    model = nn.Linear(512, 512, bias=False)
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False)
    step_once(optimizer)
    tables = 2 * 4 * (256 if name.endswith("8bit") else 16)  # the values of the codes, for two moments
    assert optimizer.optimizer_state_bytes() == pytest.approx(bytes_an_element * 512 * 512 + tables, rel=2e-3)
    assert dist_optim.get_spec(name).state_bytes.startswith(str(bytes_an_element))
