"""What the shared conftest adds to a run: no dead rank, no skip and no heap of process groups goes unnoticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import os, signal, time
import pytest

def test_leaves_a_dead_rank(two_ranks):
    os.kill(two_ranks.run(os.getpid)[1], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not two_ranks.dead_ranks and time.monotonic() < deadline:
        time.sleep(0.02)

def test_next_one_is_not_blamed(two_ranks):
    assert len(two_ranks.run(os.getpid)) == 2

@pytest.mark.parametrize("case", range(2))
def test_skipped_in_the_body(case):
    pytest.skip("no such package")

@pytest.mark.skip(reason="no such device")
def test_skipped_by_mark():
    pass
"""

LEAVES_GROUPS = """
import os
from pathlib import Path

def test_leaves_groups(two_ranks):
    two_ranks.run(exec, "import torch.distributed as dist\\nfor _ in range(30): dist.new_group()")
    Path("ranks").write_text(str(two_ranks.run(os.getpid)))
"""
WITHOUT_GROUPS = """
import os
from pathlib import Path

def test_has_ranks_of_its_own(two_ranks):
    before, now = Path("ranks").read_text(), str(two_ranks.run(os.getpid))
    assert now != before
    Path("ranks").write_text(now)
"""
AFTER_THAT = """
import os
from pathlib import Path

def test_has_the_same(two_ranks):
    assert str(two_ranks.run(os.getpid)) == Path("ranks").read_text()
"""


def test_dead_ranks_fail_the_test_that_left_them_and_skips_are_counted(tmp_path: Path) -> None:
    run = run_of(tmp_path, TESTS)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "ERROR at teardown of test_leaves_a_dead_rank" in run.stdout
    assert "left dead ranks in the pool of 2 (rank: exit code): {1: -9}" in run.stdout
    assert "skipped: 3 (2 x no such package; 1 x no such device)" in run.stdout
    assert "2 passed, 3 skipped, 1 error" in run.stdout


def test_ranks_that_hold_many_process_groups_end_with_their_file(tmp_path: Path) -> None:
    run = run_of(tmp_path, LEAVES_GROUPS, WITHOUT_GROUPS, AFTER_THAT)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout + run.stderr


def run_of(directory: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """pytest on these files, in order, beside a copy of the conftest."""
    shutil.copy(CONFTEST, directory)
    for at, text in enumerate(files):
        (directory / f"test_{at}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(CONFTEST.parents[1])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
