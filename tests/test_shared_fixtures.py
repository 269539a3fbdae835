"""What the shared conftest adds to a run: no dead rank goes unnoticed, and no skip goes uncounted."""

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


def test_dead_ranks_fail_the_test_that_left_them_and_skips_are_counted(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_generated.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(CONFTEST.parents[1])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "ERROR at teardown of test_leaves_a_dead_rank" in run.stdout
    assert "left dead ranks in the pool of 2 (rank: exit code): {1: -9}" in run.stdout
    assert "skipped: 3 (2 x no such package; 1 x no such device)" in run.stdout
    assert "2 passed, 3 skipped, 1 error" in run.stdout
