"""``make faults``: saves through the Trainer's and accelerate's doors, with a fault at each of their file-system calls.

Writes docs/faults.json, and the table of docs/checkpoints.md from it. Some minutes; the tests take a sample of it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import textwrap
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from door_runs import BesideAccelerate, BesideTraining, ByAccelerateEach, ByTrainer, Run
from fault_sweep import FAULTS, KINDS, Sweep
from fresh import own_libraries
from rich.progress import track
from two_rank_saves import calls_of, problem_of

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "faults.json", ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- faults: begin (written by make faults) -->", "<!-- faults: end -->"
TWO_RANKS: dict[str, type[Run]] = {
    "Trainer": ByTrainer,
    "Trainer, asynchronous_saves": BesideTraining,
    "accelerate": ByAccelerateEach,
    "accelerate, asynchronous": BesideAccelerate,
}
EVERY = (3, 1)
"""Every third call of rank 0, which writes most, and each of rank 1."""


def versions() -> dict[str, str]:
    """Of the packages whose calls are counted."""
    return {name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")}


def one_process(folder: Path) -> dict[str, dict[str, Any]]:
    """By what saves, and by fault."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        sweep = Sweep(kind, folder / kind)
        found[kind] = {fault: asdict(sweep.at(fault)) for fault in track(FAULTS, description=kind)}
    return found


def two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """By what saves, and by the rank that is killed: the other one ends and names it, and what is resumed is exact."""
    found: dict[str, dict[str, Any]] = {}
    for name, kind in TWO_RANKS.items():
        kind(folder / f"{name} alone", 1)  # imports what a rank needs, once
        counts = calls_of(kind, folder / name)
        for lost in (0, 1):
            numbers = range(0, counts[lost], EVERY[lost])
            problems = [
                f"call {number}: {text}"
                for number in track(numbers, description=f"{name}, rank {lost}")
                if (text := problem_of(kind, folder / f"{name} {lost} {number}", lost, number))
            ]
            found.setdefault(name, {})[f"rank {lost}"] = {"calls": len(numbers), "problems": problems}
    return found


def table(results: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    lines = [
        "| a save | a fault at each of | loads: the save before | the new save | refused | anything else |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, by_fault in results["one process"].items():
        for fault, one in by_fault.items():
            cells = [one["before"], one["after"], one["refused"], len(one["problems"])]
            lines.append(f"| {kind} | {one['calls']} calls, {fault} | " + " | ".join(map(str, cells)) + " |")
    lost = [
        f"{name}: {of['calls'] - len(of['problems'])} of {of['calls']} calls of {rank}"
        for name, ranks in results["two ranks"].items()
        for rank, of in ranks.items()
    ]
    text = (
        "Two ranks under DDP, a new folder, one of them killed at every third call of rank 0 or each of rank 1: the "
        "other ends with an error that names it, and two new ranks resume exactly, the save before or the new one. "
    )
    return "\n".join([*lines, "", *textwrap.wrap(text + "; ".join(lost) + ".", 125, break_on_hyphens=False)])


def write_page(results: dict[str, Any]) -> str:
    """The page with these results."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


SECTIONS = {"one process": one_process, "two ranks": two_ranks}


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    found: dict[str, Any] = {"versions": versions()}
    with tempfile.TemporaryDirectory() as folder, own_libraries():
        for section in sys.argv[1:] or SECTIONS:
            found[section] = SECTIONS[section](Path(folder) / section)
    results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if results.keys() > SECTIONS.keys():
        PAGE.write_text(write_page(results))
    parts = [part for section in SECTIONS for part in found.get(section, {}).values()]
    return int(any(one["problems"] for part in parts for one in part.values()))


if __name__ == "__main__":
    sys.exit(main())
