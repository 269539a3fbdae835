"""Second half of ``make parity``: train a small Llama under every engine, and write docs/end_to_end.md from that.

Each cell is the distance of the weights from the one-process run, relative to the distance that run moved. The floor
is how far apart one-process runs end that differ only in how each batch is cut into parts and summed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from end_to_end import BATCH, EVALUATE_EVERY, PARTS, PLACEMENTS, RUNS, STEPS, Measured, measure
from rich.progress import track

from dist_optim.testing import RankPool

RESULTS = Path(__file__).parent.parent / "docs" / "end_to_end.json"
PAGE = RESULTS.with_suffix(".md")
WORLD_SIZE = 4


def measure_all(names: list[str]) -> list[dict[str, Any]]:
    """One row a run; those of other names, where some are asked for, keep their figures."""
    kept = {row["name"]: row for row in json.loads(RESULTS.read_text())} if names else {}
    wanted = [run for run in RUNS if not names or run.name in names or str(run) not in kept]
    with RankPool(WORLD_SIZE, timeout_s=300) as pool:
        for run in track(wanted, description=f"{WORLD_SIZE} ranks"):
            measured: Measured = pool.run(measure, run, list(PLACEMENTS))[0]
            kept[str(run)] = {"name": str(run), "floor": measured.floor, **measured.distances}
    return [kept[str(run)] for run in RUNS]


def page(rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    columns = ["floor", *PLACEMENTS]
    lines = [
        "# End to end",
        "",
        "Written by `make parity` from `docs/end_to_end.json`, which the same command measures; do not edit.",
        "",
        f"A small Llama of odd sizes (nothing divides by two or three), {STEPS} steps of {BATCH} samples, an",
        f"evaluation every {EVALUATE_EVERY} steps, through real forward, backward and reduction on {WORLD_SIZE} ranks",
        "(gloo, on CPU).",
        "Each figure is the distance of the weights from the one-process run, relative to the distance that run moved.",
        f"**floor** is the noise: the largest such distance between one-process runs that cut a batch into {PARTS[0]},",
        f"{', '.join(map(str, PARTS[1:-1]))} or {PARTS[-1]} parts and sum. The tests refuse more than twice the floor.",
        "",
        "| optimizer | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = (f"{row[column]:.1e}" if row[column] else "0" for column in columns)
        lines.append(f"| `{row['name']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    rows = measure_all(sys.argv[1:])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))
    print(f"written: {RESULTS.name}, {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
