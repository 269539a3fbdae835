"""``make memory``: what ranks really hold beside what ``dist_optim.planning`` says; writes docs/memory.json and .md.

Every name under every strategy, in fp32 and in bf16, on CPU ranks: weights, gradients, masters and optimizer state of
the fullest rank and of the mean, counted on storages. A cell that holds text is a refusal, and the plan's is the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import memory
import torch
from memory import COLUMNS, DTYPES, FIELDS, deviation
from rich.progress import track

import dist_optim
from dist_optim.testing import RankPool

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, PAGE = DOCS / "memory.json", DOCS / "memory.md"
TIMEOUT_S = 300.0
Rows = dict[str, dict[str, Any]]
ALLOWED = 0.05
"""The largest deviation that a plan may have."""

HEAD = """\
# Memory, planned and measured

Written by `make memory` from `docs/memory.json`, which the same command measures; do not edit.

`dist-optim plan` says before a launch what each rank will hold ([choosing.md](choosing.md)). Here a small Llama of odd
sizes ({numel:,} parameters) is planned, and trained, by every optimizer under every strategy, and its storages are
counted. A cell is the optimizer's state on the fullest rank as measured, in bytes a parameter of the whole model; a
second number is that of bf16, where it differs. Behind it stands the largest deviation of the plan from the measurement
(of weights, gradients, masters and state; of the fullest rank and the mean of all; in fp32 and bf16), where it is more
than 0.1 %. **The largest of all is {largest:.2%}.** {count} cells are measured; {refused} are refused, by the job and
by the plan with the same words: a dash.

The plan does not know these numbers: it steps upstream's own class on tensors without storage. DeepSpeed's bf16 engine
has fp32 masters; elsewhere bf16 weights are stepped as they are. Estimates are not measured here: activations, the
engines' buffers, scratch, seconds.

"""
FOOT = """
Measured with {versions} on CPU ranks (gloo), as many as behind the strategy. Gradients are those that
are kept after backward, and the fp32 copy that DeepSpeed makes of some of them for each call of the optimizer.
FlashOptim is in its mode without kernels, which need a GPU; they keep a byte a moment, and one that corrects bf16.
"""


def measure(names: list[str], own: list[memory.Column]) -> Rows:
    """By name and column, all of one number of ranks: by precision, what was planned and what was measured."""
    world_size = own[0].num_ranks
    found: Rows = {name: {} for name in names}
    with RankPool(world_size, timeout_s=TIMEOUT_S) as pool:
        for name in track(names, description=f"{world_size} ranks"):
            for column in own:
                found[name][str(column)] = {
                    precision: {
                        "planned": memory.planned(name, column, precision),
                        "measured": memory.measured(name, column, precision, pool),
                    }
                    for precision in DTYPES
                }
    return found


def planned_again(rows: Rows) -> Rows:
    """The same measurements beside the plans of today."""
    for name, row in track(rows.items(), description="plans"):
        for column in COLUMNS:
            for precision, cell in row.get(str(column), {}).items():
                cell["planned"] = memory.planned(name, column, precision)
    return rows


def is_refused(cell: dict[str, Any]) -> bool:
    """Whether it is, by both alike; where they do not agree, the cell is wrong."""
    return isinstance(cell["planned"], str) and cell["planned"] == cell["measured"]


def exceeding(results: dict[str, Any]) -> list[str]:
    """Cells in which the plan is farther off than is allowed, or refuses what runs, in words."""
    return [
        f"{name}, {column}, {precision}: {cell}"
        for name, row in results["rows"].items()
        for column, precisions in row.items()
        for precision, cell in precisions.items()
        if not is_refused(cell) and not _is_near(cell)
    ]


def _is_text(cell: dict[str, Any]) -> bool:
    return isinstance(cell["planned"], str) or isinstance(cell["measured"], str)


def _is_near(cell: dict[str, Any]) -> bool:
    return not _is_text(cell) and deviation(cell["planned"], cell["measured"]) <= ALLOWED


def page(results: dict[str, Any]) -> str:
    """docs/memory.md."""
    cells = [cell for row in results["rows"].values() for column in row.values() for cell in column.values()]
    served = [cell for cell in cells if not _is_text(cell)]
    largest = max(deviation(cell["planned"], cell["measured"]) for cell in served)
    head = HEAD.format(numel=results["numel"], largest=largest, count=len(served), refused=len(cells) - len(served))
    lines = ["| name | " + " | ".join(results["columns"]) + " |", "|" + " --- |" * (1 + len(results["columns"]))]
    for name, row in results["rows"].items():
        words = [_words(column, results["numel"]) for column in row.values()]
        lines.append(f"| `{name}` | {' | '.join(words)} |")
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    return head + "\n".join(lines) + "\n" + FOOT.format(versions=versions)


def _words(precisions: dict[str, Any], numel: int) -> str:
    """State in fp32 and, where it differs, in bf16."""
    served = {key: cell for key, cell in precisions.items() if not _is_text(cell)}
    if not served:
        return "-"
    states = [f"{cell['measured']['optimizer state'][0] / numel:.3g}" for cell in served.values()]
    worst = max(deviation(cell["planned"], cell["measured"]) for cell in served.values())
    return "; ".join(dict.fromkeys(states)) + (f" ({worst:.1%})" if worst > 0.001 else "")


def write(rows: Rows) -> dict[str, Any]:
    """The results, one line a cell, and the page where every name has every column."""
    packages = ("transformers", "deepspeed")
    titles = [str(column) for column in COLUMNS]
    results: dict[str, Any] = {
        "versions": {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in packages},
        "fields": list(FIELDS),
        "columns": titles,
        "numel": sum(one.numel() for one in memory.make_llama().parameters()),
        "rows": {
            name: {title: rows[name][title] for title in titles if title in rows[name]}
            for name in dist_optim.names()
            if name in rows
        },
    }
    RESULTS.write_text(json.dumps(results, separators=(",", ":")).replace("}},", "}},\n") + "\n")
    if all(len(row) == len(COLUMNS) for row in results["rows"].values()):
        PAGE.write_text(page(results))
    return results


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="measure these alone, and keep the others' figures")
    parser.add_argument("--strategies", nargs="+", help="measure these alone, and keep the others' figures")
    parser.add_argument("--plans", action="store_true", help="measure nothing: plan again, and write the page")
    asked = parser.parse_args()
    names = asked.names or dist_optim.names()
    started = time.monotonic()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    if asked.plans:
        results = write(planned_again(results["rows"]))
    chosen = [column for column in COLUMNS if column.strategy in (asked.strategies or [column.strategy])]
    for world_size in sorted({column.num_ranks for column in chosen} if not asked.plans else ()):
        for name, row in measure(names, [column for column in chosen if column.num_ranks == world_size]).items():
            results["rows"].setdefault(name, {}).update(row)
        results = write(results["rows"])
    for problem in exceeding(results):
        print(f"too far: {problem}")
    print(f"{len(names)} names in {time.monotonic() - started:.0f} s; written: {RESULTS.name}, {PAGE.name}")
    return 1 if exceeding(results) else 0


if __name__ == "__main__":
    sys.exit(main())
