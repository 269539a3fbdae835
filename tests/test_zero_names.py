"""Every registered name under DeepSpeed: equal to one process, and the committed tables say so."""

from __future__ import annotations

import importlib.util
import json

import pytest
import zero_names
from zero_names import STAGES, refusal_of, served_names
from zero_tables import ZERO, ZERO_COLUMNS, ZERO_PAGE, Results, zero_cells, zero_page

import dist_optim
from dist_optim.testing import RankPool

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

MEASURE = "run `python tests/measure_zero.py` and commit what it writes"
WITH_STAGE = [(name, STAGES[at % len(STAGES)]) for at, name in enumerate(served_names())]


@needs_deepspeed
@pytest.mark.parametrize(("name", "stage"), WITH_STAGE)
def test_equals_one_process_after_every_step(name: str, stage: int, two_ranks: RankPool) -> None:
    assert two_ranks.run(zero_names.gaps_of, name, stage) == [(0.0, 0.0)] * 2


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_itself_equals_one_process_with_its_graph(stage: int, two_ranks: RankPool) -> None:
    """torch's AdamW as DeepSpeed's client optimizer: what a gap on own gradients would have to be compared with."""
    assert two_ranks.run(zero_names.floor_of, stage) == [0.0, 0.0]


@needs_deepspeed
def test_without_the_nodes_in_its_graph_stage_3_is_seen_to_differ(two_ranks: RankPool) -> None:
    for given, own in two_ranks.run(gaps_without_nodes):
        assert given == 0 and own > 1e-8


def gaps_without_nodes() -> tuple[float, float]:
    bracketed = zero_names.zero.bracketed
    zero_names.zero.bracketed = lambda model: model
    try:
        return zero_names.gaps_of("adamw_torch", 3)
    finally:
        zero_names.zero.bracketed = bracketed


@pytest.fixture(scope="module")
def results() -> Results:
    loaded: Results = json.loads(ZERO.read_text())
    return loaded


def test_the_page_is_what_the_results_give(results: Results) -> None:
    assert ZERO_PAGE.read_text() == zero_page(results), MEASURE


def test_every_name_is_measured_in_every_column_or_refused(results: Results) -> None:
    assert sorted([*results["rows"], *results["refused"]]) == dist_optim.names(), MEASURE
    assert results["refused"] == {name: why for name in dist_optim.names() if (why := refusal_of(name))}, MEASURE
    assert all(list(row) == list(ZERO_COLUMNS) for row in results["rows"].values()), MEASURE


def test_given_the_engines_gradients_every_bit_is_equal(results: Results) -> None:
    assert not [name for name, row in results["rows"].items() if any(given != 0 for given, _ in row.values())]
    assert zero_cells(results, "galore_adamw") == ["0"] * 4
    assert set(zero_cells(results, "galore_adamw_layerwise")) == {"refused"}


def test_on_own_gradients_two_ranks_are_equal_to_the_bit(results: Results) -> None:
    two = [title for title in ZERO_COLUMNS if title.endswith(", 2")]
    assert not [name for name, row in results["rows"].items() if any(row[title][1] != 0 for title in two)]
    assert not [title for title in two if results["floors"][title] != 0]


def test_a_gap_is_shown() -> None:
    row = {title: [2.5e-3 if title == "ZeRO 2, 3" else 0.0, 0.0] for title in ZERO_COLUMNS}
    spoiled = {"columns": list(ZERO_COLUMNS), "rows": {"sgd": row}, "refused": {}}
    assert zero_cells(spoiled, "sgd") == ["0", "0", "2.5e-03", "0"]
