"""What the documents say can be done: code compiles and runs, links and named tests exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ADDING = ROOT / "docs" / "adding-an-optimizer.md"


def code_blocks(document: Path) -> list[str]:
    """The python blocks of a document, in order."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_compile(document: Path) -> None:
    for number, block in enumerate(code_blocks(document)):
        compile(block, f"{document.name}, block {number}", "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(document: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", document.read_text()) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    """Paths in backquotes that start in one of our folders."""
    pattern = r"`((?:dist_optim|launch|configs|tests|tests_multigpu|docs|docker)/[\w./-]+)`"
    named = re.findall(pattern, document.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_defect_names_tests_that_exist() -> None:
    for line in (ROOT / "docs" / "upstream-defects.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line.rpartition(" | ")[2])
        assert named, f"no test is named: {line}"
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


def test_example_of_adding_an_optimizer_runs(tmp_path: Path) -> None:
    module, check = code_blocks(ADDING)
    (tmp_path / "sign_norm.py").write_text(module)
    (tmp_path / "test_sign_norm.py").write_text(check)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
