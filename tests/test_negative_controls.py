"""The parity tests can fail: each defect that they guard against is put in, and they must notice it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from cases.galore import CASES as GALORE
from parity import Case, run_case

from dist_optim.exchange import transfer
from dist_optim.exchange.plan import Bucket
from dist_optim.testing import RankPool


def one_owner_lacks_the_others_gradients(bucket: Bucket, fields: Any, *rest: Any) -> Any:
    """The slices of the other ranks are lost on their way to rank 0, for one matrix."""
    full = yield from transfer.gather_to_owner(bucket, fields, *rest)
    rank = torch.distributed.get_rank()
    for item in bucket.owned[rank][:1] if rank == 0 else ():
        gradient = full[0][item.index]
        kept = torch.zeros_like(gradient)
        item.layout.view_of(kept, rank).copy_(item.layout.view_of(gradient, rank))
        gradient.copy_(kept)
    return full


def updates_do_not_travel_back(*transfer: Any) -> Any:
    yield


def with_defect(case: Case, placement: str, name: str, defect: Callable[..., Any]) -> list[str]:
    with mock.patch(f"dist_optim.stepping.{name}", defect):
        return run_case(case, placement)


@pytest.mark.parametrize(
    ("placement", "name", "defect"),
    [
        ("fsdp2", "at_owner.gather_to_owner", one_owner_lacks_the_others_gradients),
        ("fsdp2", "step.scatter_from_owner", updates_do_not_travel_back),
        ("ddp", "step.scatter_from_owner", updates_do_not_travel_back),
    ],
)
def test_lost_transfer_is_noticed(placement: str, name: str, defect: Callable[..., Any], two_ranks: RankPool) -> None:
    problems = two_ranks.run(with_defect, GALORE[0], placement, name, defect)
    assert any(problems)


def one_rank_plans_otherwise() -> None:
    """Rank 1 cuts other rounds: without the comparison its collectives would not match rank 0's."""
    with mock.patch("dist_optim.building.build.assert_alike"):  # which compares what was asked for
        run_case(GALORE[0], "ddp", bucket_bytes=6000 if torch.distributed.get_rank() == 0 else 1 << 20)


def test_ranks_with_different_plans_are_refused_before_step_one(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="RanksDisagreeError: The plan of 'galore_adamw' differs"):
        two_ranks.run(one_rank_plans_otherwise)
