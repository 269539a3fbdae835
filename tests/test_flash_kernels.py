"""FlashOptim's kernels (8-bit state, error bits, fused steps) at their owners, under Triton's interpreter.

The ranks are this file's own: Triton becomes an interpreter when it is imported, for the life of a process.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import flash_interpreter
import pytest
import torch
from fresh import own_fork_server
from parity import Case, build_subject, make_model, place, run_case, run_second_life, take_step
from torch import nn

import dist_optim
from dist_optim.errors import StateDictError
from dist_optim.optimizers.flash import FlashDriver
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

LINEAR = ((33, 31), (20, 13), (64, 32), (2, 24))
"""1023 elements (one short of whole blocks and of a kernel's tile), 260 (8 blocks and 4), whole blocks, and two rows.
Every FSDP2 cut but that of 64 x 32 falls inside a block of 32."""
EXTRA = ((5,), (3, 2, 3, 3))


def upstream(name: str, modes: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    import flashoptim

    optimizer: torch.optim.Optimizer = getattr(flashoptim, name)(groups, **modes)
    return optimizer


def case(name: str, upstream_name: str, dtype: torch.dtype, label: str, values: dict[str, Any], **modes: Any) -> Case:
    return Case(
        name,
        functools.partial(upstream, upstream_name, modes),
        {"lr": 1e-2, "weight_decay": 0.05, **values},
        constructor=modes,
        steps=4,
        growth=2.0,
        linear=LINEAR,
        extra=EXTRA,
        frozen=("linears.3.weight",),
        without_gradient=("linears.2.bias",),
        dtype=dtype,
        label=label,
    )


FP32: dict[str, Any] = {"master_weight_bits": None}
ADAMW = case("flash_adamw", "FlashAdamW", torch.bfloat16, "all defaults", {})
ADAMW_FP32 = case("flash_adamw", "FlashAdamW", torch.float32, "8-bit state", {}, **FP32)
CASES = (
    ADAMW,
    ADAMW_FP32,
    case("flash_adamw", "FlashAdamW", torch.bfloat16, "unfused, 32 bits", {}, fused=False, master_weight_bits=32),
    case("flash_adam", "FlashAdam", torch.float16, "fp16, as floats", {}, compress_state_dict=False),
    case("flash_sgd", "FlashSGD", torch.float32, "fused alone", {"momentum": 0.9}, quantize=False, **FP32),
    case("flash_sgdw", "FlashSGDW", torch.bfloat16, "8-bit momentum", {"momentum": 0.9}),
    case("flash_sgdw", "FlashSGDW", torch.bfloat16, "error bits alone", {}),
    case("flash_lion", "FlashLion", torch.bfloat16, "all defaults", {}),
)


WITH_STATE = {name for name, _ in make_model(ADAMW).named_parameters()} - {"linears.3.weight", "linears.2.bias"}


@pytest.fixture(scope="module")
def interpreted_ranks() -> Iterator[RankPool]:
    with own_fork_server(), RankPool(2) as pool:
        pool.run(flash_interpreter.enable)
        yield pool


def every_placement(case: Case) -> None:
    problems = run_case(case, "ddp", bucket_bytes=3000) + run_case(case, "fsdp2", bucket_bytes=3000)
    problems += run_second_life(case, "fsdp2")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_at_owners_equal_upstream_in_one_process(case: Case, interpreted_ranks: RankPool) -> None:
    interpreted_ranks.run(every_placement, case)


def stepped(case: Case, steps: int = 2) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    model = place(make_model(case), "fsdp2")
    optimizer = build_subject(case, model)
    for step in range(steps):
        take_step(case, model, optimizer, step)
    return model, optimizer


def state_of_one_rank(case: Case) -> tuple[dict[str, dict[str, torch.dtype]], int]:
    _, optimizer = stepped(case)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["state"]
    dtypes = {name: {key: value.dtype for key, value in own.items()} for name, own in state.items()}
    return dtypes, optimizer.optimizer_state_bytes()


def test_state_is_saved_as_codes_scales_and_error_bits(interpreted_ranks: RankPool) -> None:
    expected = {
        "step": torch.int64,
        "exp_avg::quantized": torch.int8,
        "exp_avg::scales": torch.float16,
        "exp_avg_sq::quantized": torch.uint8,
        "exp_avg_sq::scales": torch.float16,
        "error_bits": torch.int8,
    }
    shares = interpreted_ranks.run(state_of_one_rank, ADAMW)
    saved = {name: dtypes for state, _ in shares for name, dtypes in state.items()}
    assert saved == dict.fromkeys(WITH_STATE, expected)


def test_state_is_sharded_and_takes_three_bytes_an_element(interpreted_ranks: RankPool) -> None:
    _, of_rank = zip(*interpreted_ranks.run(state_of_one_rank, ADAMW), strict=True)
    numel = sum(p.numel() for name, p in make_model(ADAMW).named_parameters() if name in WITH_STATE)
    assert 3.1 * numel < sum(of_rank) < 3.3 * numel  # 1 + 1 for moments, 1 of error bits, 4 / 32 for scales, the steps
    assert max(of_rank) < 0.7 * sum(of_rank)  # 64 x 32 is more than half of all, and one owner's


def dtypes_saved_as_floats() -> set[torch.dtype]:
    floats = next(case for case in CASES if not case.constructor.get("compress_state_dict", True))
    _, optimizer = stepped(floats)
    return {state["exp_avg"].dtype for state in optimizer.state_dict()["state"].values()}


def test_uncompressed_state_is_saved_as_floats(interpreted_ranks: RankPool) -> None:
    assert interpreted_ranks.run(dtypes_saved_as_floats) == [{torch.float32}, {torch.float32}]


def load_into_another_mode() -> list[str]:
    messages = []
    _, optimizer = stepped(ADAMW)
    for other in ({"quantize": False}, {"master_weight_bits": 32}, {"master_weight_bits": None}):
        case = replace(ADAMW, constructor=other)
        with pytest.raises(StateDictError) as caught:
            build_subject(case, place(make_model(case), "fsdp2")).load_state_dict(optimizer.state_dict())
        messages.append(str(caught.value))
    return messages


def test_state_of_another_mode_is_refused(interpreted_ranks: RankPool) -> None:
    for messages in interpreted_ranks.run(load_into_another_mode):
        assert "quantize=True" in messages[0]
        assert "saved with 1 bytes of error bits" in messages[1] and "keeps 2" in messages[1]
        assert "saved with 1 bytes of error bits" in messages[2] and "keeps 0" in messages[2]


def channels_last(module: Any) -> nn.Module:
    """torch's stubs do not know this form of ``to``."""
    converted: nn.Module = module.to(memory_format=torch.channels_last)
    return converted


def step_channels_last(engine: str) -> list[str]:
    """A convolution in channels_last: upstream's fused kernels refuse it, in the step, where only its owner would."""
    from flashoptim import FlashAdamW

    def convolution() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3, bias=False)

    reference = convolution()
    contiguous = FlashAdamW(reference.parameters(), **FP32)
    strided = channels_last(convolution())
    refusing = FlashAdamW(strided.parameters(), **FP32)
    model = place(channels_last(convolution()), engine)
    ours = dist_optim.build_optimizer(model, "flash_adamw", print_audit=False, **FP32)
    for step in range(3):
        gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        strided.weight.grad = gradient.to(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="contiguous"):
            refusing.step()
        reference.weight.grad = gradient.clone()
        contiguous.step()
        (parameter,) = model.parameters()
        parameter.grad = gradient.to(memory_format=torch.channels_last)
        ours.step()
    kept = parameter.is_contiguous(memory_format=torch.channels_last)
    return [] if kept and torch.equal(parameter, reference.weight) else [f"{parameter} is not {reference.weight}"]


@pytest.mark.parametrize("engine", ["none", "ddp"])
def test_fused_step_of_channels_last_parameters(engine: str, interpreted_ranks: RankPool) -> None:
    assert interpreted_ranks.run(step_channels_last, engine) == [[], []]


# Negative controls ------------------------------------------------------------------------------------------------


def blocks_of_the_slices() -> list[str]:
    """What upstream itself does under FSDP2: blocks of 32 counted from the start of each rank's slice."""
    with mock.patch.object(FlashDriver, "runs_on_slices", lambda self, values, device: True):
        return run_case(ADAMW_FP32, "fsdp2")


def test_parity_notices_blocks_counted_in_slices(interpreted_ranks: RankPool) -> None:
    problems = [problem for of_rank in interpreted_ranks.run(blocks_of_the_slices) for problem in of_rank]
    assert any("linears.0.weight" in problem for problem in problems)
    assert not any("linears.2.weight" in problem for problem in problems)  # 32 rows of 32: a cut between two blocks


def second_life_with(spoil: str) -> list[str]:
    """The error bits are lost on the way to disk, or the fp16 scales are rounded as a cast to bf16 would."""
    encode = FlashDriver.encode_state

    def spoiled(self: FlashDriver, state: Any) -> dict[str, Any]:
        encoded = encode(self, state)
        if spoil == "error bits" and "error_bits" in encoded:
            encoded["error_bits"] = torch.zeros_like(encoded["error_bits"])
        if spoil == "scales":
            encoded |= {k: v.bfloat16().half() for k, v in encoded.items() if k.endswith("::scales")}
        return encoded

    with mock.patch.object(FlashDriver, "encode_state", spoiled):
        return run_second_life(ADAMW if spoil == "error bits" else ADAMW_FP32, "fsdp2")


@pytest.mark.parametrize("spoil", ["error bits", "scales"])
def test_second_life_notices_state_that_is_not_exact(spoil: str, interpreted_ranks: RankPool) -> None:
    assert any(interpreted_ranks.run(second_life_with, spoil))
