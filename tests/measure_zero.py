"""Third part of ``make parity``: every name under every ZeRO stage, through DeepSpeed's engine; writes docs/zero.md.

Each cell has two figures, after the worst of ten steps: the largest difference of any weight, relative to the largest
of its tensor, from one process that is given the engine's averaged gradients, and from one process on its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from typing import Any

import torch
import zero_names
from parity_tables import TABLE, write_tables
from rich.progress import track
from zero_names import STAGES, refusal_of, served_names
from zero_tables import ZERO, ZERO_COLUMNS, column_title, write_zero_page

import dist_optim
from dist_optim.testing import RankPool

WORLD_SIZES = (2, 3)
TIMEOUT_S = 300.0


def measure(names: list[str]) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Figures by name and column, and the floors by column."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    floors = {}
    for world_size in WORLD_SIZES:
        with RankPool(world_size, timeout_s=TIMEOUT_S) as pool:
            for stage in STAGES:
                floors[column_title(stage, world_size)] = max(pool.run(zero_names.floor_of, stage))
            for name in track(names, description=f"ZeRO on {world_size} ranks"):
                for stage in STAGES:
                    by_rank = pool.run(zero_names.gaps_of, name, stage)
                    found[name][column_title(stage, world_size)] = list(map(max, zip(*by_rank, strict=True)))
    return found, floors


def in_order(row: dict[str, Any]) -> dict[str, Any]:
    """By column: all ranks of a stage side by side."""
    return {title: row[title] for title in ZERO_COLUMNS}


def versions() -> dict[str, str]:
    packages = ("deepspeed", "transformers")
    return {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in packages}


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="measure these alone, and keep the others' figures")
    names = parser.parse_args().names or served_names()
    started = time.monotonic()
    held: dict[str, Any] = json.loads(ZERO.read_text())["rows"] if ZERO.exists() else {}
    found, floors = measure(names)
    known = {**held, **found}
    rows = {name: in_order(known[name]) for name in served_names() if name in known}
    results = {
        "versions": versions(),
        "columns": list(ZERO_COLUMNS),
        "floors": in_order(floors),
        "rows": rows,
        "refused": {name: why for name in dist_optim.names() if (why := refusal_of(name))},
    }
    ZERO.write_text(json.dumps(results, indent=1) + "\n")
    write_zero_page(results)
    write_tables(json.loads(TABLE.read_text()))
    largest = max(cell[0] for row in found.values() for cell in row.values())
    print(f"{len(found)} names in {time.monotonic() - started:.0f} s, largest gap given gradients {largest:.1e}")
    return 1 if largest > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
