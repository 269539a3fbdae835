"""`make trainer-suite`: transformers' own tests of its Trainer, with its Trainer and with ours; writes
docs/trainer_suite.json and the table in docs/trainer.md.

The tests are in transformers' repository, not in its packages: they are fetched from there, at one commit, or given as
`--checkout FOLDER`. They need packages that nothing else here needs, which go into an environment of their own, below
`.compat`, on top of this one. About half an hour; `--only PART` measures a part, and keeps the others' results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "trainer_suite.json", ROOT / "docs" / "trainer.md"
WORK = ROOT / ".compat" / "trainer-suite"
REPOSITORY = "https://github.com/huggingface/transformers"
COMMIT = "e2372ffabdf6da99364d3d053da7783acf5f623c"
"""5.2.0.dev0; a later commit may be given, and has the same tests in more files."""
NEEDED = ("parameterized", "optuna", "evaluate", "scikit-learn", "sentencepiece")
OTHERS = ("callback", "seq2seq", "utils", "jit_checkpoint", "distributed_loss")
PARTS: dict[str, tuple[str, ...]] = {
    "test_trainer": ("-m", "not accelerator", "test_trainer.py"),
    "for accelerators": ("-m", "accelerator", "test_trainer.py"),
    "the rest": (*(f"test_trainer_{name}.py" for name in OTHERS), "test_training_args.py"),
}
OWN_FORMAT = (
    "asks for `optimizer.pt`; ours is the folder `optimizer/`, which does not depend on strategy and number of ranks"
)
REASONS = {
    "test_save_checkpoints": OWN_FORMAT,
    "test_save_best_checkpoint": OWN_FORMAT,
    "test_bnb_8bit_optimizer_skip_embedding": (
        "reads bitsandbytes' manager from the optimizer before `train()`, where ours is not built yet; embeddings have "
        "a state of 32 bits all the same"
    ),
}
"""Why a test that passes with transformers' Trainer does not with ours."""
LIMIT_S = 3600
Outcomes = dict[str, str]


def environment() -> Path:
    """A Python with what the tests need besides, on top of this one's packages."""
    python = WORK / "environment" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        found = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        (Path(found.stdout.strip()) / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *NEEDED], check=True)
    return python


def checkout() -> Path:
    """transformers' repository at `COMMIT`."""
    folder = WORK / "transformers"
    if not (folder / "tests" / "trainer").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", str(folder)]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "fetch", "-q", "--depth", "1", REPOSITORY, COMMIT], check=True)
        subprocess.run([*git, "checkout", "-q", "FETCH_HEAD", "--", "tests", "conftest.py", "pyproject.toml", "utils"])
    return folder


def run(python: Path, source: Path, part: str, suite: str) -> Outcomes:
    """By test, `passed`, `skipped` or the first line of what was raised; with `suite`'s Trainer ("stock" or "ours")."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    given = {**os.environ, **offline, "PYTHONPATH": path, "SUITE": suite, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-p", "trainer_suite", "-W", "ignore", "--timeout", "300"]
        chosen = [f"tests/trainer/{one}" if one.endswith(".py") else one for one in PARTS[part]]
        command = [str(python), "-m", "pytest", *options, f"--junitxml={report}", *chosen]
        subprocess.run(command, cwd=source, env=given, timeout=LIMIT_S)
        return dict(read_report(ElementTree.parse(report).getroot()))


def read_report(report: ElementTree.Element) -> Iterable[tuple[str, str]]:
    """What pytest's XML says of each test."""
    for case in report.iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        failure = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        if failure is not None:
            yield name, re.sub(r"0x[0-9a-f]+", "0x", (failure.get("message") or "failed").partition("\n")[0])[:200]
        else:
            yield name, "passed" if case.find("skipped") is None else "skipped"


def compared(stock: Outcomes, ours: Outcomes) -> dict[str, Any]:
    """How many pass, and what passes with one Trainer alone."""
    both = stock.keys() & ours.keys()
    return {
        "stock": sum(outcome == "passed" for outcome in stock.values()),
        "ours": sum(outcome == "passed" for outcome in ours.values()),
        "skipped": sum(outcome == "skipped" for outcome in stock.values()),
        "only stock": {name: ours[name] for name in sorted(both) if stock[name] == "passed" != ours[name]},
        "only ours": {name: stock[name] for name in sorted(both) if ours[name] == "passed" != stock[name]},
        "neither": {
            name: stock[name] for name in sorted(both) if not {"passed", "skipped"} & {stock[name], ours[name]}
        },
    }


def declared() -> dict[str, Any]:
    """What the results belong to."""
    return {"transformers": importlib.metadata.version("transformers"), "commit": COMMIT}


BEGIN, END = "<!-- suite: begin -->\n", "<!-- suite: end -->\n"


def table(results: dict[str, Any]) -> str:
    """The part of the page between the marks."""
    parts = results["parts"]
    lines = [
        f"Tests of commit `{results['commit'][:10]}` with transformers {results['transformers']}, one process on a CPU",
        "without a network; written by `make trainer-suite` from `docs/trainer_suite.json`.",
        "",
        "| tests | pass with transformers' Trainer | pass with ours | of those that theirs passes |",
        "| --- | --- | --- | --- |",
    ]
    for name, part in parts.items():
        kept = part["stock"] - len(part["only stock"])
        lines.append(f"| {name} | {part['stock']} | {part['ours']} | {kept} |")
    missing = sorted(name for part in parts.values() for name in part["only stock"])
    lines += ["", "Not with ours:", "", *(f"- `{name}` {reason_of(name)}." for name in missing)] if missing else []
    better = sorted(name for part in parts.values() for name in part["only ours"])
    lines += ["", f"With ours alone: {', '.join(f'`{name}`' for name in better)}."] if better else []
    return "\n".join(lines) + "\n"


def reason_of(name: str) -> str:
    """Why a test passes with transformers' Trainer alone."""
    return REASONS[name.partition("::")[2]]


def with_table(text: str, results: dict[str, Any]) -> str:
    """The page with the table of these results."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(results) + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="transformers' repository, at the commit that is to be run")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts of the tests")
    given = parser.parse_args()
    python, source = environment(), given.checkout or checkout()
    for part in given.only:
        outcomes = {suite: run(python, source, part, suite) for suite in ("stock", "ours")}
        kept = json.loads(RESULTS.read_text())["parts"] if RESULTS.exists() else {}
        measured = {**kept, part: compared(outcomes["stock"], outcomes["ours"])}
        results = {**declared(), "parts": {name: measured[name] for name in PARTS if name in measured}}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
