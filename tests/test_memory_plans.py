"""docs/memory.md: every name under every strategy, the plan within 5 % of what was measured, and still so today."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import measure_memory
import memory
import pytest
from memory import COLUMNS, DTYPES, FIELDS, Column
from mesh_doors import make_moe

import dist_optim
from dist_optim.testing import RankPool

AGAIN = "run `make memory` and commit what it writes"
RESULTS = json.loads(measure_memory.RESULTS.read_text())


def column_of(strategy: str) -> Column:
    return next(column for column in COLUMNS if column.strategy == strategy)


def test_every_name_is_measured_under_every_strategy() -> None:
    assert list(RESULTS["rows"]) == dist_optim.names(), AGAIN
    for name, row in RESULTS["rows"].items():
        assert list(row) == [str(column) for column in COLUMNS], f"{name}: {AGAIN}"
        assert all(set(cell) == set(DTYPES) for cell in row.values())
    assert RESULTS["fields"] == list(FIELDS)


def test_every_plan_is_near_what_was_measured() -> None:
    assert measure_memory.exceeding(RESULTS) == []
    wrong = copy.deepcopy(RESULTS)
    for cell in (wrong["rows"]["adamw_torch"]["fsdp2, 3"]["fp32"], wrong["rows"]["sgd"]["zero3, 3"]["bf16"]):
        cell["planned"]["weights"][1] *= 1.06
    wrong["rows"]["galore_adamw_layerwise"]["zero2, 3"]["fp32"]["planned"] = "Another refusal."
    wrong["rows"]["lion"]["one, 1"]["fp32"]["planned"] = "Refused by the plan alone."
    assert len(measure_memory.exceeding(wrong)) == 4, "control"


def test_the_page_is_made_of_the_results() -> None:
    assert measure_memory.page(RESULTS) == measure_memory.PAGE.read_text(), AGAIN


@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_plans_are_those_of_today(column: Column) -> None:
    for name, precision in (("adamw_torch", "bf16"), ("galore_adamw", "fp32"), ("prodigy", "fp32"), ("muon", "bf16")):
        cell = RESULTS["rows"][name][str(column)][precision]
        assert memory.planned(name, column, precision) == cell["planned"], f"{name}: {AGAIN}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_hold_what_is_planned(strategy: str, two_ranks: RankPool) -> None:
    """A few cells today, on other numbers of ranks than the page has them."""
    column = replace(column_of(strategy), num_ranks=2)
    for name, precision in (("adamw_torch", "fp32"), ("galore_adamw", "bf16")):
        planned, found = (
            memory.planned(name, column, precision),
            memory.measured(name, column, precision, two_ranks),
        )
        assert not isinstance(planned, str) and not isinstance(found, str)
        assert memory.deviation(planned, found) <= measure_memory.ALLOWED, f"{name}: {planned}, {found}"


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero3", 2)])
def test_each_expert_is_planned_as_the_matrix_that_it_is(
    strategy: str, ranks: int, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    """Stacks of experts: bytes, owners, rounds and what travels to owners, beside a job."""
    pool = {2: two_ranks, 4: four_ranks}[ranks]
    column = replace(column_of(strategy), num_ranks=ranks, make=make_moe)
    for name in ("galore_adamw", "apollo_adamw", "muon"):
        planned, found = memory.planned(name, column, "fp32"), memory.measured(name, column, "fp32", pool)
        assert not isinstance(planned, str) and not isinstance(found, str)
        assert memory.deviation(planned, found) <= measure_memory.ALLOWED, f"{name}: {planned}, {found}"
        if not column.placement:
            continue
        wanted = memory.forecast(name, column, "fp32")
        imbalance, num_rounds, sent, received = map(max, zip(*pool.run(memory.dealt, name, column), strict=True))
        assert (wanted.owned_imbalance, wanted.num_rounds) == (pytest.approx(imbalance), num_rounds), name
        assert wanted.wire.get("step: gradients to owners", 0) == max(sent, received), name
