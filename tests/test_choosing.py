"""docs/choosing.md says what the planner says today."""

from __future__ import annotations

import json

import pytest

import choosing
import dist_optim
from dist_optim.planning import STRATEGIES, read_model

AGAIN = "run `make choosing` and commit what it writes"


def test_the_page_is_made_of_the_results_and_has_every_name() -> None:
    results = json.loads(choosing.RESULTS.read_text())
    assert choosing.PAGE.read_text() == choosing.page(results), AGAIN
    assert list(results["optimizers"]) == dist_optim.names(), AGAIN
    assert all(list(row) == list(STRATEGIES[1:]) for row in results["strategies"].values()), AGAIN


@pytest.mark.parametrize(("name", "strategy"), [("galore_adamw", "fsdp2"), ("adamw_torch", "ddp"), ("muon", "zero1")])
def test_its_numbers_are_those_of_today(name: str, strategy: str) -> None:
    results = json.loads(choosing.RESULTS.read_text())
    found = choosing.planned(read_model(choosing.MODEL), name, strategy)
    assert found == results["strategies"][name][strategy], AGAIN
