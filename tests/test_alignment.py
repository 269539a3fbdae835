"""Gradients that an engine keeps inside a bucket begin anywhere in memory, and matrix products round by that."""

from __future__ import annotations

from unittest import mock

import parity
import pytest
import torch
from cases import all_cases
from parity import Case, run_case
from placements import inject
from torch import Tensor, nn

from dist_optim.testing import RankFailure, RankPool, assert_no_problems_on_any_rank

CASES = {case.name: case for case in reversed(all_cases()) if case.name in ("apollo_adamw", "galore_adamw", "muon")}


def inject_from_a_bucket(model: nn.Module, full: dict[str, Tensor | None]) -> None:
    """The same gradients, each one element into storage of its own."""
    inject(model, full)
    for parameter in model.parameters():
        if parameter.grad is not None:
            inside = torch.empty(parameter.grad.numel() + 1, dtype=parameter.grad.dtype)[1:].view(parameter.grad.shape)
            parameter.grad = inside.copy_(parameter.grad)


def equals_upstream(case: Case, is_mended: bool = True) -> None:
    with mock.patch.object(parity, "inject", inject_from_a_bucket):
        if is_mended:
            assert_no_problems_on_any_rank(run_case(case, "ddp"))
        else:
            with mock.patch("dist_optim.stepping.step.as_if_alone", lambda gradient: gradient):
                assert_no_problems_on_any_rank(run_case(case, "ddp"))


@pytest.mark.parametrize("name", CASES)
def test_gradients_inside_a_bucket_give_the_same_bits(name: str, two_ranks: RankPool) -> None:
    two_ranks.run(equals_upstream, CASES[name])


def test_control_used_where_they_lie_they_round_otherwise(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="differs after step"):
        two_ranks.run(equals_upstream, CASES["apollo_adamw"], False)
