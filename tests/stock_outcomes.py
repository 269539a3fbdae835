"""What a stock optimizer did in a cell, from what each rank ended with: a word of docs/situations.md, and its size."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from situations import NOT_APPLICABLE
from stock_sessions import StockEngine, import_classes
from stock_situations import BY_TITLE, NOT_FOR_STOCK, Ended, name_of, stock_cell

from dist_optim.testing import RankFailure, RankPool
from dist_optim.testing import pool as rank_pool
from dist_optim.testing.failure import describe_exit

RIGHT, ROUNDED, OFF, RAISES, DIES, HANGS = "right", "rounded", "off", "raises", "dies", "hangs"
ROUNDING = 1e-6
"""Of the way that the weights went: what another order of fp32 sums makes here, and no wrong update does."""
HANGS_AFTER_S = 8.0
OTHERS_S = 2.5
"""For the others to end or to raise, too, once a rank raised."""


Cell = dict[str, str | float]


@dataclass(frozen=True)
class StockOutcome:
    """What a cell of the second table says."""

    kind: str
    text: str = ""
    """Of an error, in one line; or why there is nothing to try."""
    where: str = ""
    """Which ranks raise, and what the others do; or whether ranks end with different weights."""
    distance: float | str = 0.0
    """Of weights that are other than one process's, by the way that these went."""


def stock_outcome(title: str, engine: StockEngine, pool: RankPool) -> StockOutcome:
    """Measure one cell. Ranks import and train before it, so that no time-out counts imports."""
    if reason := reason_against(title, engine.title):
        return StockOutcome(NOT_APPLICABLE, reason)
    with tempfile.TemporaryDirectory() as directory:
        if not pool.process_ids:
            pool.run(stock_cell, "evaluated, then saved and resumed", engine, Path(directory) / "first")
        pool.run(import_classes, name_of(title))
        try:
            with mock.patch.multiple(rank_pool, OTHERS_MAY_REPORT_S=OTHERS_S, native_stacks=lambda *_: {}):
                folder = Path(directory) / "checkpoint"
                return of_ended(pool.run(stock_cell, title, engine, folder, timeout_s=HANGS_AFTER_S))
        except RankFailure as failure:
            return of_failure(failure, engine.num_ranks)


def reason_against(title: str, engine: str) -> str:
    """Why there is nothing to try; what is so for ours, and has to do with the engine, is so for stock."""
    reason = NOT_FOR_STOCK.get(title, {}).get(engine, "")
    return reason or (BY_TITLE[title].not_for.get(engine, "") if title in BY_TITLE else "")


def of_ended(ended: Sequence[Ended]) -> StockOutcome:
    """All ranks came to the end."""
    distances = [one.distance for one in ended]
    if any(math.isnan(one) or math.isinf(one) for one in distances):
        return StockOutcome(OFF, where=_agreement(ended), distance="NaN")
    largest = float(f"{max(distances):.1e}")
    if largest > ROUNDING:
        return StockOutcome(OFF, where=_agreement(ended), distance=largest)
    return StockOutcome(ROUNDED, distance=largest) if largest else StockOutcome(RIGHT)


def _agreement(ended: Sequence[Ended]) -> str:
    return "ranks differ" if len({one.digest for one in ended}) > 1 else ""


def of_failure(failure: RankFailure, num_ranks: int) -> StockOutcome:
    """Some rank raised, died or did not end."""
    raised = [re.search(r"Stopped: (.*)", text) for _, text in sorted(failure.tracebacks.items())]
    if None in raised:
        raise failure  # of this code
    if failure.exit_codes:
        died = describe_exit(min(failure.exit_codes.values(), key=lambda code: code or 0))
        return StockOutcome(DIES, died)  # whether the others die of it, too, is a matter of moments
    if raised:
        texts = [match[1] for match in raised if match]
        return StockOutcome(RAISES, texts[0], _ranks(len(raised), num_ranks) + _others(failure, num_ranks))
    return StockOutcome(HANGS)


def _ranks(count: int, num_ranks: int) -> str:
    if num_ranks == 1:
        return ""
    return "on all" if count == num_ranks else f"on {count} of {num_ranks}"


def _others(failure: RankFailure, num_ranks: int) -> str:
    if len(failure.tracebacks) == num_ranks:
        return ""
    return ", rest waits" if failure.still_running else ", rest goes on"


def as_json(outcome: StockOutcome) -> Cell:
    """What is not empty of it."""
    return {key: value for key, value in vars(outcome).items() if value or key == "kind"}
