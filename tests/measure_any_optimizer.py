"""Measure every class of the packages that are installed here, and write ``docs/any-optimizer.md``.

    python tests/measure_any_optimizer.py                      # all, into docs/any_optimizer.json and .md
    python tests/measure_any_optimizer.py heavyball torch.optim  # these packages; others keep what was measured
    python tests/measure_any_optimizer.py pytorch_optimizer.SOAP

A class is run alone in one process first: one that fails there is listed, and no more is asked of it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from any_optimizer import ENGINES, PACKAGES, measured_on_ranks, mode_of
from any_runs import Choice, imported
from torch.optim import Optimizer

from dist_optim.testing import RankPool
from dist_optim.testing.failure import RankFailure

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "any_optimizer.json", DOCS / "any-optimizer.md"


def classes_of(module: str) -> list[str]:
    found = vars(imported(module))
    return sorted(
        name
        for name, value in found.items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer and name[0] != "_"
    )


class Ranks:
    """Two ranks; made anew after a failure that leaves them in disorder."""

    def __init__(self) -> None:
        self._pool: RankPool | None = None

    def run(self, *arguments: Any) -> dict[str, Any]:
        if self._pool is None:
            self._pool = RankPool(2, timeout_s=120)
        try:
            outcome: dict[str, Any] = self._pool.run(*arguments)[0]
            return outcome
        except RankFailure as failure:
            self.close()
            return {"result": "failed", "text": str(failure)[-400:]}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def measure(choice: Choice, ranks: Ranks) -> dict[str, Any]:
    mode = mode_of(choice)
    if "fails" in mode:
        return {"alone": mode["fails"]}
    row: dict[str, Any] = {"mode": mode["mode"]}
    for engine in ENGINES:
        with tempfile.TemporaryDirectory() as folder:
            row[engine] = ranks.run(measured_on_ranks, choice, mode, engine, folder)
    return row


def main(wanted: list[str]) -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "classes": {}}
    ranks = Ranks()
    for module, (package, choices) in PACKAGES.items():
        try:
            listed = classes_of(module)
            results["versions"][package] = importlib.metadata.version(package)
        except ImportError as error:
            print(f"{module}: {error}")
            continue
        for name in listed:
            label = f"{module}.{name}"
            if wanted and not {module, label} & set(wanted):
                continue
            choice = choices.get(name, Choice(module, name))
            results["classes"][label] = measure(choice, ranks)
            print(
                label,
                {key: one if isinstance(one, str) else one["result"] for key, one in results["classes"][label].items()},
            )
            sys.stdout.flush()
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1:])
