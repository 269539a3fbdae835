"""What any strategy saves, any other goes on with, to the bit: each loads what the one before has saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import measure_reshard
import pytest
from strategies import BREAK, CHAIN, SHORT_CHAIN, STRATEGIES, Recipe, gap, gaps_of_chain, leg, one_process, recipe_of

from dist_optim.testing import RankPool

PoolOf = Callable[[int], RankPool]


@pytest.fixture
def pool_of(one_rank: RankPool, two_ranks: RankPool, three_ranks: RankPool, four_ranks: RankPool) -> PoolOf:
    return lambda number: [one_rank, two_ranks, three_ranks, four_ranks][number - 1]


CHAINS = [
    (recipe_of("galore_adamw"), CHAIN),
    *(
        (recipe_of(name), SHORT_CHAIN) for name in ("adafactor", "adamw_bnb_8bit", "muon", "prodigy")
    ),  # others: the page
    (recipe_of("schedule_free_adamw", "bf16"), ("one", "zero0:2", "fsdp2:2", "zero2:3", "ddp:2", "zero3:2", "one")),
    (recipe_of("galore_adamw_layerwise"), ("ddp:2", "fsdp2:3", "one")),
    (recipe_of("schedule_free_adamw inside backward"), ("fsdp2:2", "zero3:2", "one", "ddp:2")),
    (recipe_of("galore_adamw", "fp16"), ("fsdp1:2", "zero1:2", "zero3:3", "zero2:2", "ddp:2")),
]


@pytest.mark.parametrize(("recipe", "chain"), CHAINS, ids=lambda value: str(value) if isinstance(value, Recipe) else "")
def test_each_strategy_goes_on_with_what_another_has_saved(
    recipe: Recipe, chain: tuple[str, ...], pool_of: PoolOf, tmp_path: Path
) -> None:
    gaps = gaps_of_chain(recipe, chain, pool_of, tmp_path)
    assert {cell: gap for cell, gap in gaps.items() if gap} == {}


def leg_without(what: str, folder: Path) -> float:
    recipe, steps = recipe_of("galore_adamw"), range(BREAK, BREAK + 1)
    with mock.patch(what):
        return gap(leg("zero2:2", recipe, steps, folder, None), one_process(recipe)[BREAK : BREAK + 2])


@pytest.mark.parametrize("what", ["rank_state.install", "read_pieces"])
def test_control_without_the_state_or_the_weights_a_run_goes_elsewhere(
    what: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(leg, "ddp:2", recipe_of("galore_adamw"), range(BREAK), None, tmp_path / "run")
    room = "run_state" if what == "read_pieces" else "optimizer_state"
    assert min(two_ranks.run(leg_without, f"dist_optim.checkpoint.{room}.{what}", tmp_path / "run")) > 1e-3


def test_the_page_is_what_its_results_give_and_every_bit_is_equal() -> None:
    results = json.loads(measure_reshard.RESULTS.read_text())
    assert measure_reshard.PAGE.read_text() == measure_reshard.write_page(results), "run `make reshard`"
    assert set(results["chains"]) == set(measure_reshard.names()), "run `make reshard`"
    assert list(results["matrix"]) == [str(one) for one in STRATEGIES]
    cells = [*results["chains"].values(), *(cell for row in results["matrix"].values() for cell in row.values())]
    assert set(cells) == {0.0}
