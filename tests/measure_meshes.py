"""Part of ``make parity``: small models on meshes through every door, on 2, 4 and 8 ranks; docs/meshes.{json,md}.

Each cell is as far from the one-process run as ``mesh_doors.distances`` says. Eight ranks take a minute to start, which
is why the tests have two and four.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mesh_doors import DOORS, EXPERTS, OPTIONS, distances, make_llama, make_moe
from rich.progress import track

from dist_optim.testing import RankPool

RESULTS = Path(__file__).parent.parent / "docs" / "meshes.json"
PAGE = RESULTS.with_suffix(".md")
BEGIN, END = "<!-- doors: begin (written by make parity) -->\n", "<!-- doors: end -->"
LLAMA = [door for door in DOORS if door != EXPERTS]
MESHES = {
    "TP, 2": (2, LLAMA),
    "FSDP2 x TP, 2 x 2": (4, LLAMA),
    "HSDP x TP, 2 x 2 x 2": (8, LLAMA),
    "EP, 2 x 2": (4, [EXPERTS]),
}
"""By title: the number of ranks, and the doors."""

Row = dict[str, Any]


def measure_all() -> list[Row]:
    """A row for each mesh and optimizer."""
    rows: list[Row] = []
    for title, (num_ranks, doors) in track(list(MESHES.items()), description="meshes"):
        with tempfile.TemporaryDirectory() as folder, RankPool(num_ranks, timeout_s=300) as pool:
            model: Any = make_moe() if doors == [EXPERTS] else make_llama()
            model.save_pretrained(folder)
            for name in ["galore_adamw"] if doors == [EXPERTS] else OPTIONS:
                floor, found = pool.run(distances, name, doors, folder)[0]
                rows.append({"mesh": title, "name": name, "floor": floor, **found})
    return rows


def table(rows: list[Row]) -> str:
    """The rows, with the door of the experts among the Trainer's."""
    lines = ["| mesh | optimizer | floor | " + " | ".join(LLAMA) + " |", "| --- | --- |" + " --- |" * (len(LLAMA) + 1)]
    for row in rows:
        found = {**row, "Trainer": row.get("Trainer", row.get(EXPERTS))}
        figures = [f"{found[door]:.1e}" if door in found else "" for door in ("floor", *LLAMA)]
        lines.append(f"| {row['mesh']} | `{row['name']}` | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def page(text: str, rows: list[Row]) -> str:
    """``text`` with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(rows) + END + rest.partition(END)[2]


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    rows = measure_all()
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), rows))
    print(f"written: {RESULTS.name}, {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
