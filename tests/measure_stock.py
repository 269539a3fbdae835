"""``make parity``: what a stock optimizer does in every situation; writes docs/situations_stock.json, and the page."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver

from measure_situations import titles, write_page
from rich.progress import track
from stock_outcomes import as_json, stock_outcome
from stock_sessions import STOCK
from stock_table import STOCK_RESULTS, StockRow, load

from dist_optim.testing import RankPool


def measure_stock(chosen: Sequence[str]) -> dict[str, StockRow]:
    """Rows by title; a pool for each engine, so that no time-out counts what another one has not imported."""
    found: dict[str, StockRow] = {title: {} for title in chosen}
    for engine in STOCK:
        with RankPool(engine.num_ranks, timeout_s=120) as pool:
            for title in track(chosen, description=engine.title):
                found[title][engine.title] = as_json(stock_outcome(title, engine, pool))
    return found


def import_once() -> None:
    """In the process of which all ranks are forks: pools start anew after each cell in which ranks part."""
    multiprocessing.set_forkserver_preload(["stock_situations", "galore_torch", "schedulefree", "deepspeed"])
    forkserver.ensure_running()


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import_once()
    chosen = sys.argv[1:] or titles()  # titles measure these rows alone, and keep the others
    rows = {**load(), **measure_stock(chosen)}
    STOCK_RESULTS.write_text(json.dumps({title: rows[title] for title in titles() if title in rows}, indent=1) + "\n")
    write_page()
    print(f"written: {STOCK_RESULTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
