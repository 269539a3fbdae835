"""docs/zero.md, and the README's ZeRO columns, from docs/zero.json and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ZERO = ROOT / "docs" / "zero.json"
ZERO_PAGE = ZERO.with_suffix(".md")

Results = dict[str, Any]


def column_title(stage: int, world_size: int) -> str:
    return f"ZeRO {stage}, {world_size}"


ZERO_COLUMNS = tuple(column_title(stage, world_size) for stage in range(4) for world_size in (2, 3))
ZERO_GROUPS = tuple(f"ZeRO {stage}" for stage in range(4))

METHOD = """\
# Parity under DeepSpeed

Written by `make parity` from `docs/zero.json`, which the same command measures; do not edit.

Every name, asked for in DeepSpeed's JSON, trains a small Llama of odd sizes (one key and value head serves three query
heads, the MLP is 173 wide) for ten steps of twelve samples through `deepspeed.initialize` with ZeRO 0 to 3 on 2 and 3
ranks (gloo, on CPU, fp32, no clipping), in two param groups. Each figure is the largest difference of any weight after
any step from dist_optim in one process, relative to the largest weight of the tensor; that one equals upstream alone,
see [parity.md](parity.md). **0 means that every bit is equal.**

The first table compares with one process that is given the gradients which the engine averaged: nothing but the
optimizer can differ.
"""
OWN = """\
The second compares with one process that computes its own gradients from the same batches. ZeRO-3 puts autograd nodes
around every module, and where three gradients meet they are then summed in another order; the one process gets such
nodes too, and two ranks are equal to the bit. On three ranks the engine's mean rounds otherwise than one process's sum.
The figure is that of the single worst element: where a gradient is all but zero, an optimizer that divides by its size
turns a rounding into a step of the other sign. [end_to_end.md](end_to_end.md) has each optimizer's own noise over all
weights. The first line is what DeepSpeed does by itself: torch's AdamW as its client optimizer, without any code of
dist_optim.
"""


def write_zero_page(results: Results) -> None:
    """Write docs/zero.md."""
    ZERO_PAGE.write_text(zero_page(results))


def zero_page(results: Results) -> str:
    """docs/zero.md."""
    installed = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    header = ["name", *results["columns"]]
    given, own = (
        [[f"`{name}`", *(_figure(row[title][at]) for title in results["columns"])] for name, row in rows_of(results)]
        for at in (0, 1)
    )
    floors = ["torch's AdamW", *(_figure(results["floors"][title]) for title in results["columns"])]
    refused = [[f"`{name}`", why] for name, why in sorted(results["refused"].items())]
    return "\n".join(
        [
            METHOD,
            f"Measured with {installed}.\n",
            _table(header, given),
            OWN,
            _table(header, [floors, *own]),
            "## Refused\n",
            _table(["name", "why"], refused),
        ]
    )


def zero_cells(results: Results | None, name: str) -> list[str]:
    """The README's ZeRO columns of one name: the worst given the engine's gradients; empty where not measured."""
    if results is None or name not in results["rows"]:
        return ["refused" if results and name in results["refused"] else ""] * len(ZERO_GROUPS)
    row = results["rows"][name]
    worst = ([row[title][0] for title in results["columns"] if title.startswith(group)] for group in ZERO_GROUPS)
    return [_figure(next((figure for figure in figures if figure != figure), max(figures))) for figures in worst]


def rows_of(results: Results) -> list[tuple[str, dict[str, list[float]]]]:
    return sorted(results["rows"].items())


def _figure(figure: float) -> str:
    return "0" if figure == 0 else f"{figure:.1e}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])
