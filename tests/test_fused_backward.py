"""Updates inside backward, against the plain optimizers in one process from the same reduced gradients: equal bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from fused import fused_reference, fused_step, place_injected, run_fused
from fused_cases import FUSED_CASES, LAYERWISE, LOMO, OTHERS
from parity import Case, build_subject, differences
from placements import full_parameters
from torch import Tensor

from dist_optim.inside_backward.ddp import BucketReduction
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

Placements = tuple[tuple[str, dict[str, Any]], ...]
SMALL = {"bucket_bytes": 6000}
"""Bytes of gradients that wait for each other: less than the largest matrix, more than most vectors."""
ON_ANY_NUMBER: Placements = (("ddp", {}), ("ddp bucket view", SMALL), ("fsdp2", {}), ("fsdp2 units", SMALL))
ON_ONE: Placements = (("none", {}), *ON_ANY_NUMBER)
ON_FOUR: Placements = (("hsdp", SMALL),)


def every_placement(case: Case, placements: Placements) -> None:
    problems = []
    for placement, options in placements:
        problems += [f"{placement} {options}: {problem}" for problem in run_fused(case, placement, **options)]
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_equals_the_plain_optimizer_on_one_rank(case: Case, one_rank: RankPool) -> None:
    one_rank.run(every_placement, case, ON_ONE)


@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_equals_the_plain_optimizer_on_two_ranks(case: Case, two_ranks: RankPool) -> None:
    two_ranks.run(every_placement, case, ON_ANY_NUMBER)


@pytest.mark.parametrize("case", [LOMO[0], LOMO[-1], *LAYERWISE[::2], OTHERS[0]], ids=str)
def test_equals_the_plain_optimizer_on_three_ranks(case: Case, three_ranks: RankPool) -> None:
    three_ranks.run(every_placement, case, ON_ANY_NUMBER)


@pytest.mark.parametrize("case", [LOMO[0], LOMO[-1], LAYERWISE[0], OTHERS[0]], ids=str)
def test_equals_the_plain_optimizer_on_a_mesh_of_two_by_two(case: Case, four_ranks: RankPool) -> None:
    four_ranks.run(every_placement, case, ON_FOUR)


ABSENT_THERE = ("linears.3.weight", "extra.0", "extra.3")


def ranks_that_use_other_parameters(case: Case) -> None:
    """Some parameters have gradients on rank 0 alone: the other ranks reduce zeros for them, at the end of the step."""
    assert_no_problems_on_any_rank(run_fused(case, "ddp", ABSENT_THERE, **SMALL))


@pytest.mark.parametrize("case", [LOMO[0], LOMO[-1]], ids=str)
def test_ranks_may_use_other_parameters_under_ddp(case: Case, three_ranks: RankPool) -> None:
    three_ranks.run(ranks_that_use_other_parameters, case)


def second_life(case: Case, placement: str) -> list[str]:
    """Save in the middle, load into fresh objects, go on."""
    expected = fused_reference(case)[-1]
    half = case.steps // 2 + 1
    first = place_injected(case, placement)
    optimizer = build_subject(case, first, fused_backward=True)
    for step in range(half):
        fused_step(case, first, optimizer, step)
    second = place_injected(case, placement)
    with torch.no_grad():
        for old, new in zip(first.parameters(), second.parameters(), strict=True):
            new.copy_(old)
    resumed = build_subject(case, second, fused_backward=True)
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(half, case.steps):
        fused_step(case, second, resumed, step)
    return differences(case, expected, full_parameters(second), "after a second life")[:5]


@pytest.mark.parametrize("case", [LOMO[-1], *LAYERWISE, OTHERS[2]], ids=str)
def test_second_life_equals_the_uninterrupted_run(case: Case, two_ranks: RankPool) -> None:
    for placement in ("ddp", "fsdp2"):
        assert not any(two_ranks.run(second_life, case, placement))


def with_local_gradients(case: Case) -> list[str]:
    """The defect of lomo-optim's hooks under DDP: the local gradient is applied, before any reduction."""

    def apply_unreduced(self: BucketReduction, index: int, gradient: Tensor) -> None:
        gradients: Mapping[int, Tensor] = {index: gradient}
        self._deliver(gradients)

    with mock.patch.object(BucketReduction, "ready", apply_unreduced):
        return run_fused(case, "ddp")


def test_applying_local_gradients_is_noticed(two_ranks: RankPool) -> None:
    """Updates come from owners, so that replicas stay equal even then; they are wrong on all ranks."""
    assert all(two_ranks.run(with_local_gradients, LOMO[0]))
