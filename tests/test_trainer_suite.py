"""The committed result of transformers' own Trainer tests is of this version, and on the page as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from measure_trainer_suite import PAGE, PARTS, REASONS, RESULTS, compared, declared, reason_of, with_table

WRITE = "run `make trainer-suite` and commit what it writes"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_it_is_of_what_is_installed(results: dict[str, Any]) -> None:
    assert {key: results[key] for key in declared()} == declared(), WRITE
    assert set(results["parts"]) <= set(PARTS) and sum(part["stock"] for part in results["parts"].values()) > 200


def test_the_page_shows_it(results: dict[str, Any]) -> None:
    assert with_table(PAGE.read_text(), results) == PAGE.read_text(), WRITE


def test_every_difference_has_a_reason_and_every_reason_a_difference(results: dict[str, Any]) -> None:
    missing = {name.partition("::")[2] for part in results["parts"].values() for name in part["only stock"]}
    assert missing == set(REASONS)
    assert all(reason_of(f"Any::{name}") for name in missing)


def test_a_new_difference_is_seen() -> None:
    found = compared({"a::x": "passed", "a::y": "passed"}, {"a::x": "passed", "a::y": "RecursionError"})
    assert (found["stock"], found["ours"]) == (2, 1) and found["only stock"] == {"a::y": "RecursionError"}
    with pytest.raises(KeyError):
        reason_of("a::y")
