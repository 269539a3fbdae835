"""Our clipping is torch's, to the bit, under every layout; DDP's gradients can be reduced to their owners alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases.galore import CASES as GALORE_CASES
from cases.torch_native import CASES as NATIVE
from parity import (
    Case,
    Net,
    build_subject,
    gradients,
    make_model,
    param_groups,
    set_learning_rates,
)
from placements import full_parameters, inject, place
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

PLACEMENTS = ("none", "ddp", "fsdp2", "fsdp2 columns", "fsdp1")


def clipped_reference(case: Case, max_norm: float, norm_type: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Upstream in one process, with torch's own clipping before each step."""
    model = make_model(case)
    named = dict(model.named_parameters())
    optimizer = case.make_reference(param_groups(case, named))
    norms = []
    for step in range(case.steps):
        for name, gradient in gradients(case, model, step).items():
            named[name].grad = gradient
        set_learning_rates(optimizer, case, step)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type).item())
        optimizer.step()
    return norms, {name: parameter.detach().clone() for name, parameter in named.items()}


def clips_as_torch_does(case: Case, norm_type: float, placements: Sequence[str] = PLACEMENTS) -> None:
    max_norm = 5.0
    norms, expected = clipped_reference(case, max_norm, norm_type)
    problems = [] if max(norms) > max_norm else ["the bound never binds"]
    for placement in placements:
        model = place(make_model(case), placement)
        optimizer = build_subject(case, model)
        for step in range(case.steps):
            inject(model, gradients(case, make_model(case), step))
            set_learning_rates(optimizer, case, step)
            norm = optimizer.clip_grad_norm_(max_norm, norm_type).item()
            if norm != norms[step]:
                problems.append(f"{placement}: the norm of step {step} is {norm!r}, not {norms[step]!r}")
            optimizer.step()
        actual = full_parameters(model)
        problems += [f"{placement}: {name}" for name in expected if not torch.equal(actual[name], expected[name])]
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("case", [GALORE_CASES[0], GALORE_CASES[-1], NATIVE[0]], ids=str)
def test_clips_as_torch_does_in_one_process(case: Case, norm_type: float, three_ranks: RankPool) -> None:
    three_ranks.run(clips_as_torch_does, case, norm_type)


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(((24, 16), (16, 24), (16, 16)), ())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net.linears:
            x = torch.tanh(layer(x))
        return x.square().sum(1).mean()


GALORE: dict[str, Any] = {"target_modules": "all-linear", "rank": 4, "update_proj_gap": 3}


def train(
    placement: str, steps: int, clip: float | None, accumulate: int = 1, **options: Any
) -> dict[str, torch.Tensor]:
    """Train through real backward passes on this rank's part of each batch."""
    torch.manual_seed(0)
    model = place(Regression(), placement)
    optimizer = dist_optim.build_optimizer(model, "galore_adamw", lr=1e-2, print_audit=False, **GALORE, **options)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if placement != "none" else (0, 1)
    for step in range(steps):
        whole = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        parts = whole.chunk(world_size)[rank].chunk(accumulate)
        for at, part in enumerate(parts):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = at == len(parts) - 1
            (model(part) / len(parts)).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return full_parameters(model)
