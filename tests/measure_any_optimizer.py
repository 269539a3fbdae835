"""Measure every class of the packages that are installed here, and write ``docs/any-optimizer.md``.

    python tests/measure_any_optimizer.py                      # all, into docs/any_optimizer.json and .md
    python tests/measure_any_optimizer.py heavyball torch.optim  # these packages; others keep what was measured
    python tests/measure_any_optimizer.py pytorch_optimizer.SOAP

A class is run alone in one process first: one that fails there is listed, and no more is asked of it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from any_optimizer import ENGINES, PACKAGES, measured, mode_of, verdict_of
from any_runs import Choice, imported
from torch.optim import Optimizer

from dist_optim.proving.known import FILE, as_known
from dist_optim.testing import RankPool
from dist_optim.testing.failure import RankFailure

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE, README = DOCS / "any_optimizer.json", DOCS / "any-optimizer.md", DOCS.parent / "README.md"
BEGIN, END = "<!-- counts: begin (written by make any-optimizer) -->", "<!-- counts: end -->"


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
            body = choice, mode, engine, folder
            row[engine] = measured(*body) if engine == "one" else ranks.run(measured, *body)
    return row


def verdicts_of(results: dict[str, Any], choices: dict[str, Choice]) -> dict[str, Any]:
    """What ``known.json`` holds: the verdicts of classes that came out right, with their own defaults."""
    known: dict[str, Any] = {}
    for label, row in results["classes"].items():
        choice = choices.get(label)
        is_right = "alone" not in row and row["DDP"]["result"] in ("exact", "whole")
        if choice is None or not is_right or choice.arguments or choice.of_matrices:
            continue
        verdict = verdict_of(choice, row["mode"])
        loaded = choice.load()
        entry = as_known(loaded, verdict) if verdict is not None and isinstance(loaded, type) else None
        known |= {} if entry is None else dict([entry])
    return dict(sorted(known.items()))


def all_choices() -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    for module, (_, choices) in PACKAGES.items():
        with contextlib.suppress(ImportError):
            found |= {f"{module}.{name}": choices.get(name, Choice(module, name)) for name in classes_of(module)}
    return found


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
    write(json.loads(RESULTS.read_text()))  # in the order in which it is kept


def write(results: dict[str, Any]) -> None:
    """The page, the README's counts, and what is known by name and version."""
    PAGE.write_text(page(results))
    README.write_text(with_counts(README.read_text(), readme_table(results)))
    FILE.write_text(json.dumps(verdicts_of(results, all_choices()), indent=1) + "\n")


WORDS = {
    "exact": "exact and sharded",
    "whole": "exact and whole",
    "refused": "refused",
    "differs": "differ",
    "failed": "fail",
}
MARKS = {
    "exact": "exact",
    "whole": "exact, whole",
    "refused": "refused",
    "differs": "**differs**",
    "failed": "**failed**",
}


def page(results: dict[str, Any]) -> str:
    """The table that people read, and the reasons below it."""
    classes = results["classes"]
    run = {label: row for label, row in classes.items() if "alone" not in row}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    counts = "\n".join(
        f"| {engine} | " + " | ".join(str(count(run, engine, result)) for result in MARKS) + " |" for engine in ENGINES
    )
    rows, reasons = [], []
    for label, row in run.items():
        texts = list(dict.fromkeys(row[engine]["text"] for engine in ENGINES if row[engine]["result"] != "exact"))
        marks = " | ".join(MARKS[row[engine]["result"]] for engine in ENGINES)
        rows.append(f"| `{label}`{_mode(row['mode'])} | {marks} |")
        reasons += [f"- `{label}`: {text}" for text in texts if text]
    alone = [f"- `{label}`: {row['alone']}" for label, row in classes.items() if "alone" in row]
    return PAGE_TEXT.format(
        versions=versions,
        num_classes=len(classes),
        num_run=len(run),
        counts_head=f"| engine | {' | '.join(MARKS.values())} |",
        rule="| --- | " + " | ".join("---" for _ in MARKS) + " |",
        counts=counts,
        head=f"| class | {' | '.join(ENGINES)} |",
        class_rule="| --- | " + " | ".join("---" for _ in ENGINES) + " |",
        rows="\n".join(rows),
        reasons="\n".join(reasons),
        alone="\n".join(alone),
    )


def readme_table(results: dict[str, Any]) -> str:
    """The counts, for the README."""
    run = {label: row for label, row in results["classes"].items() if "alone" not in row}
    packages = ", ".join(sorted(results["versions"]))
    texts: dict[str, list[str]] = {}
    for engine in ENGINES:
        counts = (f"{count(run, engine, result)} {word}" for result, word in WORDS.items())
        texts.setdefault(", ".join(counts), []).append(engine)
    lines = [f"Of {len(run)} classes of {packages} that run in one process:"]
    lines += [f"{' and '.join(engines)}: {text}." for text, engines in texts.items() if engines != ["one"]]
    return "\n".join(lines)


def with_counts(readme: str, table: str) -> str:
    """The README with the counts between their marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The README has lost the marks {BEGIN!r} and {END!r}.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def count(run: dict[str, Any], engine: str, result: str) -> int:
    return sum(row[engine]["result"] == result for row in run.values())


def _mode(mode: str) -> str:
    texts = {"present": "all gradients", "one group": "one group"}
    return f" ({texts.get(mode, mode)})" if mode != "absent" else ""


PAGE_TEXT = """# Any optimizer

*Written by `make any-optimizer`; do not edit.*

Every optimizer class that these packages export, unmodified, on two CPU ranks (gloo), against itself in one process:
{versions}.

Gradients are equal on both sides, some parameters lack one in some steps, a schedule changes rates, and half way all
is saved and loaded into fresh objects; under ZeRO a small network trains through the engine. *Exact* is every bit of
every weight after every step, and every value of the param groups in the end: each tensor stepped by its owner, state
sharded. *Exact, whole* is the same by one rank that steps all tensors, since they depend on each other, or nothing
showed that they do not.

{num_run} of {num_classes} classes run in one process with the arguments that they are given here; of those:

{counts_head}
{rule}
{counts}

{head}
{class_rule}
{rows}

## Why whole, or refused

{reasons}

## Not run in one process

{alone}
"""


if __name__ == "__main__":
    main(sys.argv[1:])
