"""``make reshard``: every strategy's checkpoints in every other, and every name through all of them.

Writes docs/reshard.json, and the tables of docs/checkpoints.md from it. Each figure is the largest difference of any
weight from one process, given equal gradients.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import track
from strategies import (
    BREAK,
    INSIDE,
    INSIDE_NAMES,
    LAYERWISE_CHAIN,
    LAYERWISE_NAMES,
    SHORT_CHAIN,
    STEPS,
    STRATEGIES,
    gap,
    gaps_of_chain,
    leg,
    one_process,
    recipe_of,
    strategy,
)
from zero_names import served_names

from dist_optim.testing import RankFailure, RankPool

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "reshard.json", ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- reshard: begin (written by make reshard) -->", "<!-- reshard: end -->"
MATRIX_OF = "galore_adamw"
EVERY = tuple(str(one) for one in STRATEGIES)
Cell = float | str
PoolOf = Callable[[int], RankPool]


@contextmanager
def pools() -> Iterator[PoolOf]:
    """Pools by their number of ranks, made when they are needed."""
    made: dict[int, RankPool] = {}
    with ExitStack() as stack:

        def pool_of(number: int) -> RankPool:
            if number not in made:
                made[number] = stack.enter_context(RankPool(number, timeout_s=300))
            return made[number]

        yield pool_of


def matrix(name: str, pool_of: PoolOf, folder: Path) -> dict[str, dict[str, Cell]]:
    """By what has saved and what loads."""
    recipe, expected = recipe_of(name), pool_of(1).run(one_process, recipe_of(name))[0]
    for text in EVERY:
        weights = pool_of(strategy(text).num_ranks).run(leg, text, recipe, range(BREAK), None, folder / text)[0]
        assert gap(weights, expected[: BREAK + 1]) == 0
    cells: dict[str, dict[str, Cell]] = {}
    for saving in track(EVERY, description=name):
        for loading in EVERY:
            cells.setdefault(saving, {})[loading] = outcome(
                lambda saving=saving, loading=loading: gap(  # type: ignore[misc]
                    pool_of(strategy(loading).num_ranks).run(
                        leg, loading, recipe, range(BREAK, STEPS), folder / saving, None
                    )[0],
                    expected[BREAK:],
                )
            )
    return cells


def outcome(measure: Callable[[], float]) -> Cell:
    try:
        return measure()
    except RankFailure as failure:
        return f"failed: {str(failure).splitlines()[0]}"


def chain(name: str, pool_of: PoolOf) -> Cell:
    """The largest difference on the way through the strategies of its chain."""
    with tempfile.TemporaryDirectory() as folder:
        return outcome(lambda: max(gaps_of_chain(recipe_of(name), chain_of(name), pool_of, Path(folder)).values()))


def chain_of(name: str) -> tuple[str, ...]:
    """The strategies that serve it."""
    return LAYERWISE_CHAIN if name in LAYERWISE_NAMES else SHORT_CHAIN


def names() -> list[str]:
    """Every name that DeepSpeed serves, those that step inside backward, and those that do where they may."""
    return [*served_names(), *LAYERWISE_NAMES, *INSIDE_NAMES]


def tables(results: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    lines = [
        f"`{MATRIX_OF}`, a small Llama of odd sizes, gloo on CPU: saved under the strategy of the row after {BREAK}",
        f"steps, loaded under that of the column into a run that has gone another way, and trained for {STEPS - BREAK}",
        'more; ":2" is the number of ranks. Each figure is the largest difference of any weight, at any of these',
        "steps, from one process with equal gradients. 0: every bit is equal.",
        "",
        "| saved, loaded | " + " | ".join(EVERY) + " |",
        "| --- |" + " --- |" * len(EVERY),
    ]
    lines += [
        f"| {saving} | " + " | ".join(shown(cells[loading]) for loading in EVERY) + " |"
        for saving, cells in results["matrix"].items()
    ]
    exact = [name for name, cell in results["chains"].items() if cell == 0]
    plain, inside, layerwise = (
        [name for name in exact if name not in (*LAYERWISE_NAMES, *INSIDE_NAMES)],
        [name.removesuffix(INSIDE) for name in exact if name in INSIDE_NAMES],
        [name for name in exact if name in LAYERWISE_NAMES],
    )
    for text in (
        f"Through {', '.join(SHORT_CHAIN)}, each loading what the one before has saved, {len(plain)} names are equal "
        f"to the bit: {listed(plain)}.",
        f"So are {listed(inside)} where they step inside backward (one, ddp, fsdp2), and from stored gradients in "
        "between (fsdp1, zero).",
        f"Through {', '.join(LAYERWISE_CHAIN)}, all inside backward: {listed(layerwise)}.",
    ):
        lines += ["", *textwrap.wrap(text, 125, break_on_hyphens=False)]
    lines += [f"`{name}`: {shown(cell)}." for name, cell in results["chains"].items() if cell != 0]
    return "\n".join(lines)


def listed(found: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in found)


def shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:.1e}" if cell else "0"


def write_page(results: dict[str, Any]) -> str:
    """The page with these results."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}"


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    asked = sys.argv[1:]
    results = json.loads(RESULTS.read_text()) if asked and RESULTS.exists() else {"matrix": {}, "chains": {}}
    with pools() as pool_of:
        if not asked or MATRIX_OF in asked:
            with tempfile.TemporaryDirectory() as folder:
                results["matrix"] = matrix(MATRIX_OF, pool_of, Path(folder))
        for name in track(asked or names(), description="every name"):
            results["chains"][name] = chain(name, pool_of)
    results["chains"] = dict(sorted(results["chains"].items()))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(write_page(results))
    print(f"written: {RESULTS.name}, {PAGE.name}")
    cells = [*results["chains"].values(), *(cell for row in results["matrix"].values() for cell in row.values())]
    return int(any(cell != 0 for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
