"""What a stock optimizer does in a situation is as docs/situations.md says, and is measured without a line of ours."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import stock_outcomes
import torch
from measure_situations import titles
from patience import PATIENCE_S
from sessions import HAS_DEEPSPEED
from situations import NOT_APPLICABLE
from stock_outcomes import (
    DIES,
    HANGS,
    HANGS_AFTER_S,
    OFF,
    RAISES,
    RIGHT,
    ROUNDED,
    Cell,
    StockOutcome,
    as_json,
    of_ended,
    of_failure,
    reason_against,
    stock_outcome,
)
from stock_sessions import STOCK, StockTorchSession, StockZeroSession
from stock_situations import Ended, stock_cell
from stock_table import counts, load

from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.testing import RankFailure, RankPool

MEASURE = "run `python tests/measure_stock.py` and commit what it writes"
BY_ENGINE = {engine.title: engine for engine in STOCK}
CHOSEN = {
    "DDP": (
        "evaluated, then saved and resumed",
        "a learning rate differs on one rank",
        "one rank leaves a layer out",
        "a step inside torch's Join",
        "gradients not reduced in a later step",
        "state read by one rank",
        "evaluated by one rank",
        "one rank fails in the step",
    ),
    "FSDP2": (
        "evaluated, then the optimizer is built",
        "loaded from before the first step",
        "loaded from before a layer's first gradient",
        "resumed by one process",
    ),
    "ZeRO-1": (
        "evaluated, then saved and resumed",
        "an infinite gradient on one rank, raised",
        "frozen at building, in a group, unfrozen later",
        "saved by one rank",
        "mixed precision (bf16)",
    ),
}
"""Of each kind of outcome; after one that ends a pool comes another cell."""


def in_short(cell: Cell) -> tuple[object, ...]:
    """What is the same on every machine: a distance but for its last digit."""
    distance = cell.get("distance", 0.0)
    size = pytest.approx(distance, rel=0.1) if isinstance(distance, float) and cell["kind"] == OFF else None
    return cell["kind"], cell.get("text"), cell.get("where"), size


@pytest.mark.parametrize("title", CHOSEN)
def test_a_stock_optimizer_ends_as_recorded(title: str) -> None:
    engine = BY_ENGINE[title]
    if engine.is_zero and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    recorded = load()
    with (
        RankPool(engine.num_ranks, timeout_s=PATIENCE_S) as pool,  # no test of ours was in its ranks
        mock.patch.object(stock_outcomes, "HANGS_AFTER_S", HANGS_AFTER_S / 2),
        mock.patch.object(stock_outcomes, "OTHERS_S", 1.0),
    ):
        found = {row: as_json(stock_outcome(row, engine, pool)) for row in CHOSEN[title]}
    for row, cell in found.items():
        assert in_short(cell) == in_short(recorded[row][title]), f"{row}: {MEASURE}"


def test_every_row_and_engine_is_recorded() -> None:
    recorded = load()
    assert list(recorded) == titles(), MEASURE
    assert all(list(row) == list(BY_ENGINE) for row in recorded.values()), MEASURE
    every = [(title, engine, cell) for title, row in recorded.items() for engine, cell in row.items()]
    said = {(title, engine): cell["text"] for title, engine, cell in every if cell["kind"] == NOT_APPLICABLE}
    assert said == {
        (title, engine): reason for title, engine, _ in every if (reason := reason_against(title, engine))
    }, MEASURE


def without_ours(folder: Path) -> tuple[str, str, float]:
    """The body: types of the optimizers that step, and a cell, where building one of ours fails."""
    with mock.patch.object(DistributedOptimizer, "__init__", side_effect=AssertionError("one of ours was built")):
        session = BY_ENGINE["DDP"].session("adamw_torch")
        assert isinstance(session, StockTorchSession) and len(session.stock) == 1
        ended = stock_cell("evaluated, then saved and resumed", BY_ENGINE["DDP"], folder)
        if not HAS_DEEPSPEED:
            return _name(session.stock[0]), "", ended.distance
        zero = BY_ENGINE["ZeRO-2"].session("adamw_torch")
        assert isinstance(zero, StockZeroSession)
        return _name(session.stock[0]), _name(zero.held.basic_optimizer), ended.distance


def _name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def test_no_optimizer_of_ours_is_built(tmp_path: Path) -> None:
    with RankPool(2) as pool:
        (torchs, deepspeeds, distance), _ = pool.run(without_ours, tmp_path / "checkpoint")
    assert torchs == "torch.optim.adamw.AdamW" and deepspeeds in (torchs, "") and distance == 0.0


def ended(*distances: float, differ: bool = False) -> list[Ended]:
    return [Ended(distance, f"{at if differ else 0}") for at, distance in enumerate(distances)]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (ended(0.0, 0.0), StockOutcome(RIGHT)),
        (ended(0.0, 3e-8), StockOutcome(ROUNDED, distance=3e-8)),
        (ended(0.0, 2e-6), StockOutcome(OFF, distance=2e-6)),
        (ended(0.0, 0.456, differ=True), StockOutcome(OFF, where="ranks differ", distance=0.46)),
        (ended(0.0, float("nan")), StockOutcome(OFF, distance="NaN")),
    ],
)
def test_the_furthest_rank_counts(ranks: list[Ended], expected: StockOutcome) -> None:
    assert of_ended(ranks) == expected


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RankFailure("x", still_running={0: "", 1: ""}), StockOutcome(HANGS)),
        (RankFailure("x", still_running={1: ""}), StockOutcome(HANGS)),
        (
            RankFailure("x", tracebacks={1: "stock_situations.Stopped: ValueError: bad\n"}, still_running={0: ""}),
            StockOutcome(RAISES, "ValueError: bad", "on 1 of 2, rest waits"),
        ),
        (
            RankFailure("x", tracebacks={1: "stock_situations.Stopped: ValueError: bad\n"}),
            StockOutcome(RAISES, "ValueError: bad", "on 1 of 2, rest goes on"),
        ),
        (
            RankFailure("x", tracebacks={rank: f"Stopped: ValueError: {rank}" for rank in (1, 0)}),
            StockOutcome(RAISES, "ValueError: 0", "on all"),
        ),
        (
            RankFailure("x", exit_codes={1: -6}, tracebacks={0: "Stopped: RuntimeError: closed"}),
            StockOutcome(DIES, "its process was ended by SIGABRT"),
        ),
    ],
)
def test_what_ranks_ended_with_is_told_apart(failure: RankFailure, expected: StockOutcome) -> None:
    assert of_failure(failure, 2) == expected


def test_an_error_of_the_measurement_is_no_outcome() -> None:
    with pytest.raises(RankFailure):
        of_failure(RankFailure("x", tracebacks={0: "NameError: name 'note' is not defined"}), 2)


def test_cells_are_counted_by_what_a_user_meets() -> None:
    row: dict[str, Cell] = {
        "a": {"kind": RIGHT},
        "b": {"kind": ROUNDED, "distance": 1e-8},
        "c": {"kind": RAISES, "text": "x", "where": "on all"},
        "d": {"kind": RAISES, "text": "x", "where": "on 1 of 2, rest waits"},
        "e": {"kind": HANGS},
        "f": {"kind": "does not apply", "text": "y"},
    }
    assert counts({"row": row}) == (
        "Of 5 cells, 2 are right, and 0 are off without a word. 1 raise on all\n"
        "ranks; in 2 ranks part: 1 raise on some of them, 1 hang, 0 die."
    )
