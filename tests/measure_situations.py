"""``make parity``: every situation under every engine; writes docs/situations.json and docs/situations.md.

A cell says that a run is right, or with what it is refused, or why there is nothing to try. Nothing else may stand in
the table: the command fails then, and writes nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from every_situation import EVERY_ROW
from failing_backward import HAS_WATCH, TITLE, outcomes
from rich.progress import track
from sessions import ENGINES, ONE_PROCESS, Engine
from situations import ALONE, DEFECT, NOT_APPLICABLE, REFUSED, RIGHT, Outcome, Situation, cell
from stock_table import StockRow, letter, load, section

from dist_optim.testing import RankFailure, RankPool

RESULTS = Path(__file__).parent.parent / "docs" / "situations.json"
PAGE = RESULTS.with_suffix(".md")
Row = dict[str, dict[str, str]]

METHOD = """\
# What happens besides training

Written by `make parity` from `docs/situations.json`, which the same command measures; do not edit.

Each row is something that happens to a run: it is evaluated, saved, resumed, or one rank fails. Each cell is one of two
outcomes, measured on CPU ranks (gloo): **right**, every bit of every weight is that of one process that does the same,
or was never interrupted; or **refused**, the same error on all ranks in that call, with a number that names its text
below. After a refusal nothing was changed, or the way back that the text names was gone, and found to be right. Where
a rank fails in backward, it raises its own error, and the others end with the one given. A dash is a cell that does not
apply: its letter says why. DDP, FSDP and ZeRO run on two ranks, HSDP on two times two. The
[second table](#what-a-stock-optimizer-does-there) has what a stock optimizer does in the same place. Tensor and
sequence parallelism have [a page of their own](meshes.md), as have the [Trainer](trainer.md) and every way from one
strategy or number of ranks [to another](checkpoints.md).

`make soak` lets it happen at random: runs of 2,000 steps under DDP, FSDP2 and ZeRO-2 that are evaluated, saved, frozen,
fail and are resumed, and end on every bit of one process. It writes `docs/soak.json`.
"""


LEGEND = (
    "What the refusals say (`R`, `X`, `Y`: numbers; `FOLDER`, `TAG`: the checkpoint's; `H`, `P`: host and process):"
)


def measure(situation: Situation, engine: Engine, pool: RankPool) -> Outcome:
    """One cell, as all ranks see it; what ranks do not agree on is a defect."""
    if engine.title in situation.not_for:
        return Outcome(NOT_APPLICABLE, situation.not_for[engine.title])
    try:
        seen = pool.run(cell, situation, engine)
    except RankFailure as failure:
        return Outcome(DEFECT, str(failure))
    if len(set(seen)) > 1:
        return Outcome(DEFECT, f"ranks see it differently: {'; '.join(map(str, seen))}")
    return seen[0]


def as_row(outcomes: dict[str, Outcome]) -> Row:
    return {title: {"kind": outcome.kind, "text": outcome.text} for title, outcome in outcomes.items()}


def measure_all(chosen: Sequence[str], pool_of: Callable[[int], RankPool]) -> dict[str, Row]:
    """Rows by title; columns in the order of the engines."""
    situations = [situation for situation in EVERY_ROW if situation.title in chosen]
    found: dict[str, dict[str, Outcome]] = {situation.title: {} for situation in situations}
    for engine in ENGINES:
        for situation in track(situations, description=engine.title):
            found[situation.title][engine.title] = measure(situation, engine, pool_of(engine.num_ranks))
    if TITLE in chosen:
        several = [engine for engine in ENGINES if engine.num_ranks > 1]
        found[TITLE] = {ONE_PROCESS.title: Outcome(NOT_APPLICABLE, ALONE[ONE_PROCESS.title]), **outcomes(several)}
    return {title: as_row(row) for title, row in found.items()}


def titles() -> list[str]:
    """Of all rows, in order."""
    return [*(situation.title for situation in EVERY_ROW), *([TITLE] if HAS_WATCH else [])]


def defects(rows: dict[str, Row]) -> list[str]:
    """Every cell that is neither right, nor refused, nor inapplicable."""
    return [
        f"{title}, {engine}: {outcome['kind']}: {outcome['text']}"
        for title, row in rows.items()
        for engine, outcome in row.items()
        if not (outcome["kind"] == RIGHT or (outcome["kind"] in (REFUSED, NOT_APPLICABLE) and outcome["text"]))
    ]


def write_page() -> None:
    """From both files of results."""
    PAGE.write_text(page(json.loads(RESULTS.read_text()), load()))


def page(rows: dict[str, Row], stock: dict[str, StockRow]) -> str:
    """The results as a page; texts of refusals, and reasons, below the table; then what stock does."""
    texts, reasons = _distinct(rows, REFUSED), _distinct(rows, NOT_APPLICABLE)

    def shown(outcome: dict[str, str]) -> str:
        if outcome["kind"] == REFUSED:
            return f"refused [{texts.index(outcome['text']) + 1}]"
        return RIGHT if outcome["kind"] == RIGHT else f"- [{letter(reasons.index(outcome['text']))}]"

    titles = [engine.title for engine in ENGINES]
    lines = [METHOD, f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    lines += [f"| {title} | {' | '.join(shown(row[engine]) for engine in titles)} |" for title, row in rows.items()]
    lines += ["", LEGEND, ""]
    lines += [f"{number}. {text}" for number, text in enumerate(texts, start=1)]
    lines += ["", "Why a cell does not apply:", ""]
    lines += [f"- [{letter(at)}] {reason}" for at, reason in enumerate(reasons)]
    return "\n".join([*lines, "", *section(stock)]) + "\n"


def _distinct(rows: dict[str, Row], kind: str) -> Sequence[str]:
    return list(dict.fromkeys(one["text"] for row in rows.values() for one in row.values() if one["kind"] == kind))


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    pools: dict[int, RankPool] = {}

    def pool_of(num_ranks: int) -> RankPool:
        return pools.setdefault(num_ranks, RankPool(num_ranks, timeout_s=120))

    chosen = sys.argv[1:] or titles()  # titles measure these rows alone, and keep the others
    held: dict[str, Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found_rows = {**held, **measure_all(chosen, pool_of)}
    rows = {title: found_rows[title] for title in titles() if title in found_rows}
    for pool in pools.values():
        pool.close()
    if found := defects(rows):
        print("\n".join(["not written, since there are defects:", *found]))
        return 1
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    write_page()
    print(f"written: {RESULTS.name}, {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
