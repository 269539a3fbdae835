"""fp32 masters of half-precision weights: upstream on fp32 copies, given the gradients in fp32."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from any_classes import ClipsTogether
from parity import Case, differences, full_parameters, gradients, inject, make_model, place
from torch import Tensor
from torch.optim import Optimizer

import dist_optim
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

CASE = Case("adamw_torch", torch.optim.AdamW, {}, linear=((7, 5), (5, 8), (1, 6)), extra=((3,),), dtype=torch.bfloat16)
"""At a rate of 1e-5 most updates are lost in bfloat16."""
CLASSES: dict[str, type[Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adafactor_torch": torch.optim.Adafactor,
    "ClipsTogether": ClipsTogether,
}


def reference_run(kind: type[Optimizer], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    case = replace(CASE, dtype=dtype)
    model = make_model(case)
    masters = {name: one.detach().float().requires_grad_() for name, one in model.named_parameters()}
    more: dict[str, Any] = {} if kind is ClipsTogether else {"weight_decay": 0.0}
    build: Any = kind
    optimizer = build(list(masters.values()), lr=1e-5, **more)
    history = []
    for step in range(case.steps):
        for name, gradient in gradients(case, model, step).items():
            masters[name].grad = None if gradient is None else gradient.float()
        optimizer.step()
        history.append({name: one.detach().to(dtype) for name, one in masters.items()})
    return history


def equals_upstream_on_copies(name: str, dtype: torch.dtype, placement: str, masters: bool = True) -> None:
    case, kind = replace(CASE, dtype=dtype), CLASSES[name]
    choice: Any = name if name in dist_optim.names() else kind
    expected = reference_run(kind, dtype)

    def build(model: torch.nn.Module) -> dist_optim.DistributedOptimizer:
        more: dict[str, Any] = {} if kind is ClipsTogether else {"weight_decay": 0.0}
        return dist_optim.build_optimizer(model, choice, lr=1e-5, master_weights=masters, print_audit=False, **more)

    model = place(make_model(case), placement)
    optimizer = build(model)
    problems = []
    for step in range(case.steps):
        if step == 5:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            second = place(make_model(case), placement)
            with torch.no_grad():
                for old, new in zip(model.parameters(), second.parameters(), strict=True):
                    new.copy_(old)
            model, optimizer = second, build(second)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        inject(model, gradients(case, make_model(case), step))
        optimizer.step()
        problems += differences(case, expected[step], full_parameters(model), f"after step {step}")
    assert_no_problems_on_any_rank(problems[:5])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CLASSES)
def test_equals_upstream_on_fp32_copies(two_ranks: RankPool, name: str, dtype: torch.dtype, placement: str) -> None:
    two_ranks.run(equals_upstream_on_copies, name, dtype, placement)


@pytest.mark.parametrize("placement", ["hsdp", "fsdp1 hybrid"])
def test_replicas_of_shards_do_too(four_ranks: RankPool, placement: str) -> None:
    for name in ("adamw_torch", "adafactor_torch"):
        four_ranks.run(equals_upstream_on_copies, name, torch.bfloat16, placement)


@pytest.mark.parametrize("name", CLASSES)
def test_in_one_process(name: str) -> None:
    equals_upstream_on_copies(name, torch.bfloat16, "none")


def test_without_masters_it_is_another_trajectory() -> None:
    with pytest.raises(AssertionError, match="differs"):
        equals_upstream_on_copies("adamw_torch", torch.bfloat16, "none", masters=False)


def test_the_audit_tells_of_updates_that_are_lost(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    dist_optim.build_optimizer(model, "adamw_torch", lr=1e-5)
    assert "master_weights=True" in capsys.readouterr().out
    dist_optim.build_optimizer(model, "adamw_torch", lr=1e-5, master_weights=True)
    assert "fp32 masters of 2 tensors" in capsys.readouterr().out
