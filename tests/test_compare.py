"""The comparisons: what counts as equal, as near, and as a problem on some rank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from dist_optim.testing import (
    RankFailure,
    RankPool,
    assert_equal,
    assert_no_problems_on_any_rank,
    max_abs_difference,
    relative_distance,
)

NEXT_ABOVE_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))


def test_equal_means_every_bit_and_nan_equals_nan() -> None:
    assert_equal({"a": [torch.tensor([1.0, math.nan])]}, {"a": [torch.tensor([1.0, math.nan])]})
    with pytest.raises(AssertionError, match="case 7: .*not equal"):
        assert_equal(NEXT_ABOVE_ONE, torch.tensor(1.0), "case 7")


@pytest.mark.parametrize("other", [torch.ones(2, dtype=torch.float64), torch.ones(2, 1), torch.ones(1)])
def test_equal_values_of_another_dtype_or_shape_are_not_equal(other: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_equal(other, torch.ones(2))


def test_max_abs_difference_sees_one_ulp_empty_tensors_and_nan() -> None:
    assert max_abs_difference(NEXT_ABOVE_ONE, torch.tensor(1.0)) == 2.0**-23
    assert max_abs_difference([torch.empty(0), torch.ones(2)], [torch.empty(0), torch.tensor([1.0, 4.0])]) == 3.0
    assert max_abs_difference([], []) == 0.0
    # A NaN before and after an ordinary difference: Python's own max would lose one of them.
    for position in range(2):
        left = [torch.tensor(1.0), torch.tensor(1.0)]
        left[position] = torch.tensor(math.nan)
        assert math.isnan(max_abs_difference(left, [torch.zeros(()), torch.zeros(())]))
    with pytest.raises(ValueError, match="Tensor 0 has shape"):
        max_abs_difference(torch.ones(2), torch.ones(2, 1))
    with pytest.raises(ValueError, match="1 and 0 tensors"):
        max_abs_difference([torch.ones(2)], [])


def test_relative_distance_is_the_error_per_way_travelled() -> None:
    start, reference = [torch.zeros(2), torch.zeros(1)], [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    weights = [torch.tensor([3.0, 0.5]), torch.tensor([4.0])]
    assert relative_distance(weights, reference, start) == 0.5 / 5.0
    assert relative_distance(reference, reference, start) == 0.0
    with pytest.raises(ValueError, match="the reference equals the start"):
        relative_distance(weights, start, start)


def test_a_problem_on_one_rank_is_reported_by_every_rank(three_ranks: RankPool) -> None:
    three_ranks.run(_report_problem_of, -1)
    with pytest.raises(RankFailure, match="ranks 0, 1, 2 raised") as caught:
        three_ranks.run(_report_problem_of, 1)
    for text in caught.value.tracebacks.values():
        assert "1 problem(s) on rank(s) 1 of 3:\n  rank 1: uneven" in text


def _report_problem_of(rank: int) -> None:
    assert_no_problems_on_any_rank(["uneven"] if dist.get_rank() == rank else [])


def test_problems_are_reported_without_a_process_group() -> None:
    assert_no_problems_on_any_rank([])
    with pytest.raises(AssertionError, match="rank 0: lonely"):
        assert_no_problems_on_any_rank(["lonely"])
