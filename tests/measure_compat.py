"""`make compat`: run the chosen tests at the ends of every declared range; writes docs/compat.json and docs/compat.md.

Each row of `compat.ROWS` gets an environment of its own below `.compat`, which is removed afterwards: some GB, some
minutes. Rows and parts by name measure these alone, and keep the other results::

    python tests/measure_compat.py --keep "lowest deepspeed" --only DeepSpeed
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from compat import CHOSEN, ROOT, ROWS, Row, lower_bounds, project

from dist_optim.overrides import TABLE

RESULTS = ROOT / "docs" / "compat.json"
PAGE = RESULTS.with_suffix(".md")
EXTRAS = "galore,apollo,flash,lomo,grok,schedulefree,stable,bnb,torchao,deepspeed,train,dev"
SHOWN = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "torchao")
LIMIT_S = 1800
Results = dict[str, Any]


def interpreter(version: str) -> str:
    """A Python of this version: one that PYTHON names, or `python3.x` on the PATH."""
    for candidate in (*os.environ.get("PYTHON", "").split(), f"python{version}"):
        asked = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == version:
                return candidate
        except OSError:
            continue
    sys.exit(
        f"No Python {version} was found. Install it, or name all of them: make compat PYTHON='/path/to/python ...'"
    )


def environment(row: Row) -> Path:
    """The row's Python, with everything installed; an environment that was made for the same versions is used again."""
    folder = ROOT / ".compat" / row.name.replace(" ", "-").replace(",", "")
    python, wanted = folder / "bin" / "python", folder / "constraints.txt"
    if wanted.exists() and wanted.read_text() == row.constraints():
        return python
    print(f"installing {folder.name}", flush=True)
    subprocess.run([interpreter(row.python), "-m", "venv", "--clear", str(folder)], check=True)
    text = folder / "asked.txt"
    text.write_text(row.constraints())
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(text)]
    subprocess.run([*pip, "--upgrade", "setuptools>=77"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "-e", f".[{EXTRAS}]"], check=True, cwd=ROOT)
    text.rename(wanted)  # last: half an environment is made again
    return python


def installed(python: Path) -> dict[str, str]:
    """Python's version, and that of every package that has a lower bound."""
    program = (
        "import importlib.metadata as m, json, platform, sys; "
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))"
    )
    done = subprocess.run([str(python), "-c", program, *lower_bounds()], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run(python: Path, part: str) -> dict[str, Any]:
    """The outcome of one part: how many tests passed, and the names of those that did not."""
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    given = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder}/tmp"]
        tests = [f"tests/{test}" for test in CHOSEN[part]]
        subprocess.run([str(python), "-m", "pytest", *options, *tests], cwd=ROOT, env=given, timeout=LIMIT_S)
        if not report.exists():
            return {"passed": 0, "skipped": {}, "failed": ["pytest did not come to its end"]}
        outcome = read_report(ElementTree.parse(report).getroot())
        if not any(outcome.values()):
            return {**outcome, "failed": ["pytest found no test, or not all of them"]}
        return outcome


def read_report(report: ElementTree.Element) -> dict[str, Any]:
    """What pytest's XML says: a count, and names with reasons where a test did not pass."""
    passed, skipped, failed = 0, {}, []
    for case in report.iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        reason = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif reason is not None:
            skipped[name] = reason.get("message", "")
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def declared() -> Results:
    """What the results belong to: the ranges, the tests that were run, and all that is read of other packages."""
    return {
        "python": project()["requires-python"],
        "bounds": lower_bounds(),
        "tests": {part: list(tests) for part, tests in CHOSEN.items()},
        "read": hashlib.sha256(repr(TABLE).encode()).hexdigest()[:16],
    }


def page(results: Results) -> str:
    """The results as a page."""
    rows, columns = results["rows"], ("environment", "Python", *SHOWN, *CHOSEN)
    lines = [
        "# Versions that are tested",
        "",
        "Written by `make compat` from `docs/compat.json`, which the same command measures; do not edit.",
        "",
        "`pyproject.toml` declares ranges, and both ends of them are measured: a chosen part of the tests, on CPU",
        "ranks, in an environment with these versions. All tests run with Python 3.11 and `constraints.txt`. A cell",
        "holds how many tests passed; and how many did not, if any.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- |" + " --- |" * (len(columns) - 1),
    ]
    for row in rows:
        versions = [row["versions"][name] for name in ("python", *SHOWN)]
        cells = [_cell(row["parts"].get(part)) for part in CHOSEN]
        lines.append(f"| {' | '.join([row['name'], *versions, *cells])} |")
    bounds = ", ".join(f"{name} {version}" for name, version in results["bounds"].items())
    lines += ["", f"All lower bounds: {bounds}.", "", "| part | tests |", "| --- | --- |"]
    lines += [f"| {part} | {', '.join(f'`{test}`' for test in tests)} |" for part, tests in results["tests"].items()]
    notes = [f"- {row['name']}: {text}" for row in rows for text in _notes(row)]
    return "\n".join([*lines, *(["", "Did not run, or did not pass:", "", *notes] if notes else [])]) + "\n"


def _cell(part: dict[str, Any] | None) -> str:
    if part is None:
        return "not run"
    return f"{part['passed']}, **{len(part['failed'])} not**" if part["failed"] else str(part["passed"])


def _notes(row: dict[str, Any]) -> list[str]:
    skipped = [f"`{name}`: {why}" for part in row["parts"].values() for name, why in part["skipped"].items()]
    return [*skipped, *(f"`{name}` failed" for part in row["parts"].values() for name in part["failed"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of: {'; '.join(row.name for row in ROWS)}")
    parser.add_argument("--only", nargs="+", choices=list(CHOSEN), default=list(CHOSEN), help="parts of the tests")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    given = parser.parse_args()
    chosen = [row for row in ROWS if not given.rows or row.name in given.rows]
    has_failed = False
    for row in chosen:
        python = environment(row)
        versions = installed(python)
        for part in given.only:
            outcome = run(python, part)
            write(row, versions, {part: outcome})  # at once: what is measured stays measured
            has_failed |= bool(outcome["failed"])
        if not given.keep:
            shutil.rmtree(python.parent.parent)
    return int(has_failed)


def write(row: Row, versions: dict[str, str], parts: dict[str, Any]) -> None:
    """Put these results among those of other rows, and of the same versions' other parts."""
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {one["name"]: one for one in before}
    kept = rows[row.name]["parts"] if row.name in rows and rows[row.name]["versions"] == versions else {}
    rows[row.name] = {"name": row.name, "versions": versions, "parts": {**kept, **parts}}
    results = {**declared(), "rows": [rows[one.name] for one in ROWS if one.name in rows]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    sys.exit(main())
