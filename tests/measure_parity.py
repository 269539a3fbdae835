"""``make parity``: measure every case under every placement, write docs/parity.json, and the tables made from it.

Each cell is the largest difference of any weight after any step from upstream in one process, relative to the largest
weight of its tensor: 0 means that every bit is equal. Both sides get the same gradients. A cell that holds text holds
the first sentence of the error with which dist_optim refused.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flash_interpreter
import torch
from cases import all_cases
from fused import fused_gaps
from fused_cases import FUSED_CASES
from parity import Case, run_gaps, with_experts
from parity_tables import COLUMNS, TABLE, Column, exceeding, write_tables
from placements import place
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from test_flash_kernels import CASES as KERNEL_CASES
from torch import nn

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.testing import RankPool

BUCKET_BYTES = 6000
"""Small rounds: a case's matrices then travel in several, two of them in flight."""
TIMEOUT_S = 300.0
Cell = float | str


@dataclass(frozen=True)
class Row:
    """What one row of the table measures: a case, or the name of an optimizer that is refused."""

    name: str
    case: Case | None = None
    inside_backward: bool = False
    """Its gradients come from a loss, and it is stepped while they come."""
    interpreted: bool = False
    """Its kernels run under Triton's interpreter, in ranks of their own."""

    @property
    def key(self) -> str:
        return str(self.case) if self.case else self.name

    def described(self) -> dict[str, Any]:
        if self.case is None:
            return {"name": self.name}
        dtype = str(self.case.dtype).removeprefix("torch.")
        return {
            "name": self.name,
            "label": self.case.label,
            "dtype": dtype,
            "steps": self.case.steps,
            "tolerance": self.case.tolerance,
            **({"inside_backward": True} if self.inside_backward else {}),
        }


def all_rows() -> list[Row]:
    """Every case, FlashOptim's kernels, and the names that are refused; sorted by name.

    Raises:
        ValueError: A registered name has neither a case nor a refusal.
    """
    rows = [Row(case.name, case) for case in all_cases()]
    rows += [Row(case.name, case, inside_backward=True) for case in FUSED_CASES]
    for case in KERNEL_CASES:
        rows.append(Row(case.name, replace(case, label=f"{case.label} (interpreted kernels)"), interpreted=True))
    measured = {row.name for row in rows}
    for name in dist_optim.names():
        if name in measured:
            continue
        if not dist_optim.get_spec(name).refusal:
            raise ValueError(f"{name} is registered and has no parity case. Add one under tests/cases/.")
        rows.append(Row(name))
    return sorted(rows, key=lambda row: row.name)


def even(case: Case) -> Case:
    """The case with first dimensions that 2 and 3 ranks divide: the nearest multiples of six."""

    def nearest(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (max(6, 6 * round(shape[0] / 6)), *shape[1:])

    linear = tuple((nearest((rows,))[0], columns) for rows, columns in case.linear)
    return replace(case, linear=linear, extra=tuple(nearest(shape) for shape in case.extra))


VARIANTS: dict[str, Callable[[Case], Case]] = {"": lambda case: case, "even": even, "experts": with_experts}


def measure_case(case: Case, placements: Sequence[str], inside_backward: bool = False) -> list[Cell]:
    """The body: one cell a placement, as this rank sees it."""
    run = fused_gaps if inside_backward else run_gaps
    cells: list[Cell] = []
    for placement in placements:
        try:
            gaps = [gap.relative for gap in run(case, placement, bucket_bytes=BUCKET_BYTES)]
            cells.append(math.nan if any(map(math.isnan, gaps)) else max(gaps))
        except DistOptimError as error:
            cells.append(first_sentence(error))
    return cells


def measure_refusal(name: str, placements: Sequence[str]) -> list[Cell]:
    """The body: with what each placement refuses the optimizer."""
    cells: list[Cell] = []
    for placement in placements:
        try:
            dist_optim.build_optimizer(place(nn.Linear(6, 6), placement), name, lr=1e-2, print_audit=False)
        except DistOptimError as error:
            cells.append(first_sentence(error))
        else:
            raise AssertionError(f"{name} says that it is refused, and was built under {placement}")
    return cells


def first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].rstrip(".") + "."


def measure_row(row: Row, pool: RankPool, wanted: Sequence[Column]) -> dict[str, Cell]:
    """Every wanted column of this world size: the worst of what the ranks saw."""
    found: dict[str, Cell] = {}
    for variant, vary in VARIANTS.items():
        columns = [c for c in wanted if c.world_size == pool.world_size and c.variant == variant]
        if not columns:
            continue
        placements = [column.placement for column in columns]
        if row.case is None:
            by_rank = pool.run(measure_refusal, row.name, placements)
        else:
            by_rank = pool.run(measure_case, vary(row.case), placements, row.inside_backward)
        for column, cells in zip(columns, zip(*by_rank, strict=True), strict=True):
            found[column.title] = worst(cells)
    return found


def worst(cells: Sequence[Cell]) -> Cell:
    """A refusal where there is one (all ranks then raise it together), a NaN, or the largest figure."""
    refusals = [cell for cell in cells if isinstance(cell, str)]
    figures = [cell for cell in cells if not isinstance(cell, str)]
    if refusals:
        return refusals[0]
    return math.nan if any(map(math.isnan, figures)) else max(figures)


def measure(rows: Sequence[Row], columns: Sequence[Column], console: Console) -> dict[str, dict[str, Cell]]:
    """Cells by row and column. Ranks with interpreted kernels come apart: Triton decides once for a process."""
    world_sizes = sorted({column.world_size for column in columns})
    found: dict[str, dict[str, Cell]] = {row.key: {} for row in rows}
    layout = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*layout, console=console) as progress:
        task = progress.add_task("", total=len(rows) * len(world_sizes))
        for world_size in world_sizes:
            for interpreted in (False, True):
                with RankPool(world_size, timeout_s=TIMEOUT_S) as pool:
                    if interpreted:
                        pool.run(flash_interpreter.enable)
                    for row in rows:
                        if row.interpreted == interpreted:
                            progress.update(task, description=f"{world_size} rank(s): {row.key}")
                            found[row.key] |= measure_row(row, pool, columns)
                            progress.advance(task)
    return found


def versions() -> dict[str, str]:
    """Of torch and the upstream packages, as installed."""
    packages = {dist_optim.get_spec(name).package for name in dist_optim.names()} - {"torch", "dist-optim"}
    packages.add("lomo-optim")  # the reference of our own LOMO and AdaLomo
    return {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in sorted(packages)}


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks, which would break up the progress bar
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables-only", action="store_true", help="measure nothing; write the tables from the results")
    parser.add_argument(
        "--columns", nargs="+", help="measure these, and keep the figures of all others", metavar="TITLE"
    )
    console, options = Console(), parser.parse_args()
    if not options.tables_only:
        started = time.monotonic()
        rows = all_rows()
        columns = [column for column in COLUMNS if not options.columns or column.title in options.columns]
        found = measure(rows, columns, console)
        if options.columns:
            kept = dict(zip((row.key for row in rows), json.loads(TABLE.read_text())["rows"], strict=True))
            found = {key: {**kept[key]["cells"], **cells} for key, cells in found.items()}
        ordered = {
            row.key: {c.title: found[row.key][c.title] for c in COLUMNS if c.title in found[row.key]} for row in rows
        }
        results = {
            "python": platform.python_version(),
            "versions": versions(),
            "rows": [{**row.described(), "cells": ordered[row.key]} for row in rows],
        }
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"{len(rows)} rows x {len(columns)} placements in {time.monotonic() - started:.0f} s")
    results = json.loads(TABLE.read_text())
    written = write_tables(results)
    summarize(results, console)
    console.print("written: " + ", ".join(path.name for path in (TABLE, *written)))
    return 1 if any(exceeding(results)) else 0


def summarize(results: dict[str, Any], console: Console) -> None:
    """Counts by kind of cell, and every cell that is not allowed."""
    cells = [cell for row in results["rows"] for cell in row["cells"].values()]
    refused = sum(isinstance(cell, str) for cell in cells)
    equal = cells.count(0.0)
    console.print(f"{equal} cells equal in every bit, {len(cells) - equal - refused} not, {refused} refused")
    for problem in exceeding(results):
        console.print(f"[red]too far:[/red] {problem}")


if __name__ == "__main__":
    sys.exit(main())
