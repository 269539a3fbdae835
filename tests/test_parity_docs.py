"""The committed tables are what ``make parity`` wrote, cover every name and case, and hold no figure too large."""

from __future__ import annotations

import copy
import json
from unittest import mock

import measure_end_to_end
import measure_meshes
import measure_resume
import pytest
from cases.torch_native import CASES as NATIVE
from end_to_end import PLACEMENTS, RUNS
from measure_parity import Cell, all_rows, even, measure_case, measure_refusal, worst
from parity_tables import (
    COLUMNS,
    DOCUMENT,
    README,
    TABLE,
    Results,
    document,
    exceeding,
    readme_table,
    refusals,
    with_table,
    zero_results,
)
from test_end_to_end import FACTOR

import dist_optim
from dist_optim.optimizers.torch_native import FusedDriver
from dist_optim.testing import RankPool

MEASURE = "run `make parity` and commit what it writes"


@pytest.fixture(scope="module")
def results() -> Results:
    loaded: Results = json.loads(TABLE.read_text())
    return loaded


def test_tables_are_what_the_results_give(results: Results) -> None:
    assert DOCUMENT.read_text() == document(results), MEASURE
    assert README.read_text() == with_table(README.read_text(), readme_table(results, zero_results())), MEASURE


def test_every_registered_name_has_a_line(results: Results) -> None:
    table = readme_table(results)
    assert not [name for name in dist_optim.names() if f"| `{name}` |" not in table], MEASURE
    refused = {name for names in refusals(results).values() for name in names}
    assert refused == {name for name in dist_optim.names() if dist_optim.get_spec(name).refusal}, MEASURE


def test_every_case_of_today_is_measured_in_every_column(results: Results) -> None:
    measured = [{key: value for key, value in row.items() if key != "cells"} for row in results["rows"]]
    assert measured == [row.described() for row in all_rows()], MEASURE
    assert all(list(row["cells"]) == [column.title for column in COLUMNS] for row in results["rows"])


def test_no_figure_exceeds_its_case_s_tolerance(results: Results) -> None:
    assert not list(exceeding(results))


@pytest.mark.parametrize("cell", [1e-3, float("nan"), "galore_adamw: not today."])
def test_a_figure_that_is_too_large_is_noticed(cell: float | str, results: Results) -> None:
    spoiled = copy.deepcopy(results)
    row = next(row for row in spoiled["rows"] if row["name"] == "galore_adamw")
    row["cells"]["FSDP1, 3"] = cell
    (problem,) = exceeding(spoiled)
    assert "galore_adamw" in problem and "FSDP1, 3" in problem
    (line,) = [line for line in readme_table(spoiled).splitlines() if line.startswith("| `galore_adamw` |")]
    assert {"1.0e-03", "nan", "refused"} & set(line.split(" | "))


def test_ranks_are_combined_to_the_worst() -> None:
    assert worst([0.0, 2.0, 1.0]) == 2.0
    assert str(worst([0.0, float("nan"), 1.0])) == "nan"
    assert worst([0.0, "refused."]) == "refused."


def measure_with_and_without_a_defect() -> list[list[Cell]]:
    """Fused kernels on slices, which round the tail of each slice otherwise."""
    fused = next(case for case in NATIVE if case.name == "adamw_torch_fused")
    with mock.patch.object(FusedDriver, "runs_on_slices", lambda self, values, device: True):
        spoiled = measure_case(fused, ["fsdp2"])
    return [measure_case(fused, ["fsdp2"]), spoiled, measure_refusal("galore_adamw_layerwise", ["fsdp1"])]


def test_cells_are_figures_or_the_first_sentence_of_a_refusal(two_ranks: RankPool) -> None:
    for (right,), (spoiled,), (refused,) in two_ranks.run(measure_with_and_without_a_defect):
        assert right == 0.0
        assert isinstance(spoiled, float) and 1e-9 < spoiled < 1e-5
        assert isinstance(refused, str) and refused.startswith(
            "galore_adamw_layerwise cannot step inside backward here"
        )
        assert refused.count(". ") == 0


def test_even_cases_divide_by_two_and_three() -> None:
    for case in filter(None, (row.case for row in all_rows())):
        shapes = [*even(case).linear, *even(case).extra]
        assert all(shape[0] % 6 == 0 for shape in shapes)


def test_readme_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="lost the marks"):
        with_table("nothing here", "")


def test_end_to_end_page_is_what_its_results_give_and_stays_within_the_noise() -> None:
    rows = json.loads(measure_end_to_end.RESULTS.read_text())
    assert measure_end_to_end.PAGE.read_text() == measure_end_to_end.page(rows), MEASURE
    assert {row["name"] for row in rows} == {str(run) for run in RUNS}, MEASURE
    specs = [dist_optim.get_spec(name) for name in dist_optim.names()]
    assert {run.name for run in RUNS} == {spec.name for spec in specs if not spec.refusal and not spec.instead}
    for row in rows:
        assert all(row[placement] <= FACTOR * row["floor"] for placement in PLACEMENTS), row


def test_the_page_of_meshes_has_what_was_measured_and_stays_within_the_noise() -> None:
    rows = json.loads(measure_meshes.RESULTS.read_text())
    text = measure_meshes.PAGE.read_text()
    assert text == measure_meshes.page(text, rows), MEASURE
    assert {row["mesh"] for row in rows} == set(measure_meshes.MESHES), MEASURE
    for row in rows:
        doors = measure_meshes.MESHES[row["mesh"]][1]
        assert 0 < row["floor"] < 3e-2 and all(row[door] <= FACTOR * row["floor"] for door in doors), row


def test_resume_page_is_what_its_results_give_and_every_bit_is_equal() -> None:
    rows = json.loads(measure_resume.RESULTS.read_text())
    assert measure_resume.PAGE.read_text() == measure_resume.page(rows), "run `make parity`"
    assert {row["name"] for row in rows} == set(measure_resume.measured_names()), "run `make parity`"
    cells = [cell for row in rows for cell in row["cells"].values()]
    assert len(cells) > 400 and set(cells) == {0.0}
