"""Every optimizer, under every placement, against upstream in one process: equal gradients, equal bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from cases import all_cases
from parity import Case, run_case, run_second_life, with_experts

from dist_optim.exchange import route, transfer
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

CASES = all_cases()
ONE_A_NAME = list({case.name: case for case in reversed(CASES)}.values())
"""`make parity` runs every case in every place; here all on one rank and two, in turn in some of the places there, and
half of the names on three and four ranks."""

SMALL_ROUNDS = 6000
"""Bytes an owner takes in one round: the cases' matrices then travel in several rounds, two of them in flight."""

Placements = tuple[tuple[str, dict[str, Any]], ...]
ON_ONE: Placements = (
    ("none", {}),
    ("fsdp2", {}),
    ("fsdp1", {"bucket_bytes": SMALL_ROUNDS}),
)
ON_TWO: Placements = (
    ("ddp", {}),
    ("fsdp2 units", {"bucket_bytes": SMALL_ROUNDS, "reduce_to_owner": True}),
    ("ddp bucket view", {"bucket_bytes": SMALL_ROUNDS, "replicate": "elementwise"}),
    ("fsdp2", {}),
    ("fsdp1", {"bucket_bytes": SMALL_ROUNDS}),
)
ON_THREE: Placements = (
    ("ddp", {}),
    ("fsdp2 units", {"bucket_bytes": SMALL_ROUNDS}),
    ("fsdp2 columns", {"bucket_bytes": SMALL_ROUNDS}),
    ("fsdp1", {"bucket_bytes": SMALL_ROUNDS}),
)
ON_FOUR: Placements = (
    ("hsdp", {"bucket_bytes": SMALL_ROUNDS}),
    ("fsdp1 hybrid", {"bucket_bytes": SMALL_ROUNDS}),
    ("fsdp1 shard_grad_op", {}),
    ("fsdp1 no_shard", {}),
)
ON_MESHES = ((2, (("tp", {"bucket_bytes": SMALL_ROUNDS}),)), (4, (("fsdp2 tp", {"bucket_bytes": SMALL_ROUNDS}),)))
"""Each of a fourth of the names here; `make parity` runs every case, and eight ranks."""


def every_placement(case: Case, placements: Placements) -> None:
    """Small rounds go in place, as large tensors do, and on four ranks in packs, as on accelerators."""
    problems = []
    for placement, options in placements:
        large = 16 if options or placement == "fsdp1 no_shard" else route.IN_PLACE_BYTES
        most = 0 if dist.get_world_size() == 4 else transfer.MAX_PEERS
        with mock.patch.object(route, "IN_PLACE_BYTES", large), mock.patch.object(transfer, "MAX_PEERS", most):
            problems += [f"{placement} {options}: {problem}" for problem in run_case(case, placement, **options)]
    assert_no_problems_on_any_rank(problems)


def in_turn(case: Case, always: int, placements: Placements) -> Placements:
    """The first ones, and one of the others: cases of one name follow each other, and get different ones."""
    return (*placements[:always], placements[always + CASES.index(case) % (len(placements) - always)])


def every_second_life(case: Case) -> None:
    problems = []
    for placement in ("ddp", "fsdp2", "fsdp1"):
        problems += [f"{placement}: {problem}" for problem in run_second_life(case, placement)]
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_upstream_on_one_rank(case: Case, one_rank: RankPool) -> None:
    one_rank.run(every_placement, case, in_turn(case, 1, ON_ONE))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_upstream_on_two_ranks(case: Case, two_ranks: RankPool) -> None:
    two_ranks.run(every_placement, case, in_turn(case, 2, ON_TWO))


@pytest.mark.parametrize("case", ONE_A_NAME[::2], ids=str)
def test_equals_upstream_on_three_ranks(case: Case, three_ranks: RankPool) -> None:
    three_ranks.run(every_placement, case, ON_THREE[ONE_A_NAME.index(case) // 2 % 2 :: 2])


@pytest.mark.parametrize("case", ONE_A_NAME[1::2], ids=str)
def test_equals_upstream_on_four_ranks(case: Case, four_ranks: RankPool) -> None:
    four_ranks.run(every_placement, case, ON_FOUR[ONE_A_NAME.index(case) // 2 % 2 :: 2])


@pytest.mark.parametrize("case", ONE_A_NAME[::2], ids=str)
def test_equals_upstream_on_meshes(case: Case, two_ranks: RankPool, four_ranks: RankPool) -> None:
    num_ranks, placements = ON_MESHES[ONE_A_NAME.index(case) // 2 % 2]
    {2: two_ranks, 4: four_ranks}[num_ranks].run(every_placement, case, placements)


WITH_EXPERTS = [case for case in ONE_A_NAME if case.name in ("adafactor", "adamw_torch", "galore_adamw", "muon")]
"""Which `make parity` does with every case."""


@pytest.mark.parametrize("case", WITH_EXPERTS, ids=str)
def test_equals_upstream_with_experts_on_a_mesh_of_their_own(case: Case, four_ranks: RankPool) -> None:
    four_ranks.run(every_placement, with_experts(replace(case, steps=5)), (("ep", {"bucket_bytes": SMALL_ROUNDS}),))


@pytest.mark.parametrize("case", ONE_A_NAME, ids=str)
def test_second_life_equals_the_uninterrupted_run(case: Case, two_ranks: RankPool) -> None:
    two_ranks.run(every_second_life, case)
