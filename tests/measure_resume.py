"""Third part of ``make parity``: save, resume, and compare with the run that went on; writes docs/resume.md from that.

One cell for every name, door and strategy on two ranks: the largest difference of any weight, after the last step. A
cell that holds text says why the door refuses the name there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerated import Training
from end_to_end import RUNS
from measure_parity import first_sentence
from resuming import gap_after_resume
from rich.progress import track
from test_checkpoint import BY_NAME, gaps_after, run_to_the_break
from test_trainer_resume import SCHEDULED
from trainers import Job, gap_between, train

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.testing import RankFailure, RankPool

RESULTS = Path(__file__).parent.parent / "docs" / "resume.json"
PAGE = RESULTS.with_suffix(".md")
NUM_RANKS = 2
Cell = float | str


def through_save_checkpoint(name: str, strategy: str, directory: Path) -> float:
    case = next(case for case in BY_NAME if case.name == name)
    run_to_the_break(case, strategy, directory)
    return max(gap.absolute for gap in gaps_after(case, strategy, directory))


def through_accelerate(name: str, strategy: str, directory: Path) -> float:
    known: dict[str, Any] = next((dict(run.options) for run in RUNS if run.name == name), {"lr": 1e-2})
    return gap_after_resume(Training(name, known), strategy, directory)


def through_trainer(name: str, strategy: str, directory: Path) -> float:
    job = Job(name, {**SCHEDULED, "max_grad_norm": 0.0})
    whole = train(job, strategy, directory / "whole")
    resumed = train(replace(job, resume=str(directory / "whole" / "checkpoint-3")), strategy, directory / "resumed")
    return gap_between(whole, resumed)


DOORS: dict[str, tuple[Callable[[str, str, Path], float], tuple[str, ...]]] = {
    "save_checkpoint": (through_save_checkpoint, ("ddp", "fsdp1", "fsdp2")),
    "accelerator.save_state": (through_accelerate, ("ddp", "fsdp1", "fsdp2")),
    "Trainer": (through_trainer, ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")),
}


def measure(name: str, door: str, strategy: str, directory: Path) -> Cell:
    """The body: one cell, as this rank sees it."""
    try:
        return DOORS[door][0](name, strategy, directory)
    except DistOptimError as error:
        return first_sentence(error)


def measured_names() -> list[str]:
    """Every name that is served on several ranks with stored gradients."""
    return sorted({case.name for case in BY_NAME} & set(dist_optim.names()))


def measure_all(names: list[str]) -> list[dict[str, Any]]:
    """One row a name."""
    rows = []
    for name in track(names, description=f"{NUM_RANKS} ranks"):
        cells: dict[str, Cell] = {}
        with RankPool(NUM_RANKS, timeout_s=300) as pool, tempfile.TemporaryDirectory() as folder:
            for door, (_, strategies) in DOORS.items():
                for strategy in strategies:
                    try:
                        found = pool.run(measure, name, door, strategy, Path(folder) / door / strategy)
                        texts = [cell for cell in found if isinstance(cell, str)]
                        cells[f"{door}, {strategy}"] = texts[0] if texts else max(found)
                    except RankFailure as failure:
                        cells[f"{door}, {strategy}"] = f"failed: {str(failure).splitlines()[0]}"
        rows.append({"name": name, "cells": cells})
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The results as a page; reasons of refusals below the table."""
    reasons: list[str] = []

    def shown(cell: Cell) -> str:
        if not isinstance(cell, str):
            return f"{cell:.1e}" if cell else "0"
        if cell not in reasons:
            reasons.append(cell)
        return f"[{reasons.index(cell) + 1}]"

    columns = [(door, strategy) for door, (_, strategies) in DOORS.items() for strategy in strategies]
    lines = [
        "# Saving and resuming",
        "",
        "Written by `make parity` from `docs/resume.json`, which the same command measures; do not edit.",
        "",
        f"Each optimizer on {NUM_RANKS} ranks (gloo, on CPU): saved in the middle, resumed in fresh objects, and",
        "compared after the last step with the run that went on (`save_checkpoint`: with upstream in one process,",
        "under equal gradients). Each figure is the largest difference of any weight; 0: every bit is equal.",
        "",
        "| optimizer | " + " | ".join(f"{door}<br>{strategy}" for door, strategy in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = [shown(row["cells"][f"{door}, {strategy}"]) for door, strategy in columns]
        lines.append(f"| `{row['name']}` | " + " | ".join(cells) + " |")
    lines += [""] + [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)] if reasons else []
    return "\n".join(lines) + "\n"


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    rows = measure_all(sys.argv[1:] or measured_names())
    if sys.argv[1:]:  # the others keep their figures
        new = {row["name"]: row for row in rows}
        rows = [*(row for row in json.loads(RESULTS.read_text()) if row["name"] not in new), *rows]
        rows = sorted(rows, key=lambda row: str(row["name"]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))
    print(f"written: {RESULTS.name}, {PAGE.name}")
    return 1 if any(str(cell).startswith("failed") or cell for row in rows for cell in row["cells"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
