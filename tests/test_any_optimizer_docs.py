"""The table of classes is what was measured, and holds no outcome that nobody may see."""

from __future__ import annotations

import copy
import json
from typing import Any

import measure_any_optimizer
import pytest
import torch
from any_optimizer import ENGINES
from measure_any_optimizer import PAGE, README, RESULTS, page, readme_table, with_counts

from dist_optim.building.groups import arrange
from dist_optim.layouts import detect
from dist_optim.proving.known import FILE, known_verdict
from dist_optim.specs.registry import spec_of_class

MEASURE = "run `make any-optimizer` and commit what it writes"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(RESULTS.read_text())
    return loaded


def test_page_and_readme_are_what_the_results_give(results: dict[str, Any]) -> None:
    assert PAGE.read_text() == page(results), MEASURE
    assert README.read_text() == with_counts(README.read_text(), readme_table(results)), MEASURE


def wrong(results: dict[str, Any]) -> list[str]:
    """Classes that are neither right nor refused under some engine."""
    return [
        f"{label} under {engine}: {row[engine]}"
        for label, row in results["classes"].items()
        if "alone" not in row
        for engine in ENGINES
        if row[engine]["result"] not in ("exact", "whole", "refused")
    ]


def test_every_class_is_right_or_refused(results: dict[str, Any]) -> None:
    assert not wrong(results)
    assert len(results["classes"]) > 150


def test_a_class_that_differs_is_noticed(results: dict[str, Any]) -> None:
    spoiled = copy.deepcopy(results)
    label = next(label for label, row in spoiled["classes"].items() if "alone" not in row)
    spoiled["classes"][label]["DDP"] = {"result": "differs", "text": "by 0.1"}
    assert len(wrong(spoiled)) == 1
    assert "**differs**" in page(spoiled)


def test_known_classes_start_without_a_proof() -> None:
    known = json.loads(FILE.read_text())
    assert "torch.optim.nadam.NAdam" in known
    model = torch.nn.Linear(3, 3)
    spec = spec_of_class(torch.optim.NAdam)
    for keywords, is_known in (({"lr": 0.5}, True), ({"weight_decay": 0.1}, False)):
        groups, arguments = arrange(model, spec, detect(model), keywords)
        assert (known_verdict(spec, groups, arguments) is not None) is is_known
    other = type("NAdam", (torch.optim.NAdam,), {"__module__": "elsewhere"})
    groups, arguments = arrange(model, spec_of_class(other), detect(model), {})
    assert known_verdict(spec_of_class(other), groups, arguments) is None


def test_classes_of_a_package_are_listed() -> None:
    assert {"Adam", "LBFGS"} < set(measure_any_optimizer.classes_of("torch.optim"))
