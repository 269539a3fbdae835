"""Runs of torchrun on two ranks that go wrong in every way the multi-rank conftest promises to end well.

Each run costs seconds to start, so cases that can share a run do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from patience import PATIENCE_S
from test_elastic import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
HARNESS = [REPOSITORY / "tests_multigpu" / name for name in ("conftest.py", "rank_agreement.py")]
SHORT_TIMEOUT_S = 6.0  # for the runs that must reach it
LONG_TIMEOUT_S = 1000.0  # for those that must not: whoever waits for it here is ended after PATIENCE_S, and fails
HEADER = """
import os, sys, time
import pytest, torch
import torch.distributed as dist
rank = int(os.environ.get("RANK", "0"))
"""


@dataclass(frozen=True, slots=True)
class Run:
    exit_code: int
    output: str

    @property
    def counts(self) -> str:
        """Pytest's last line, such as ``1 failed, 2 passed``; there is one, because one rank reports."""
        lines = re.findall(r"^=* ?((?:\d+ \w+,? ?)+) in [\d.]+s", self.output, flags=re.MULTILINE)
        assert len(lines) == 1, self.output
        return str(lines[0])


def run_ranks(
    directory: Path, tests: str, *, timeout_s: float = LONG_TIMEOUT_S, launcher: bool = False, num_ranks: int = 2
) -> Run:
    """Run the source ``tests`` on ranks of the CPU, with this group timeout, and wait for minutes at most.

    Args:
        launcher: Whether torchrun starts the ranks, and ends them when one fails; they are on their own otherwise.
    """
    for source in HARNESS:
        shutil.copy(source, directory)
    (directory / "test_generated.py").write_text(HEADER + tests)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks), "--standalone"] if launcher else []
    command = [sys.executable, *torchrun, "-m", "pytest", "-p", "no:cacheprovider", "."]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    own = [
        {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
        for rank in range(num_ranks)
    ]
    with open(directory / "output", "w+b") as output:
        started = [
            subprocess.Popen(
                command, cwd=directory, env=_environment(timeout_s) | given, stdout=output, stderr=subprocess.STDOUT
            )
            for given in ([{}] if launcher or num_ranks == 1 else own)
        ]
        try:
            codes = [process.wait(PATIENCE_S) for process in started]
        finally:
            for process in started:
                process.kill()
        output.seek(0)
        return Run(max(codes, key=abs), output.read().decode(errors="replace"))


def _environment(timeout_s: float) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "DIST_OPTIM_TEST_TIMEOUT_S": str(timeout_s),
    }


def test_all_ranks_passing_exits_zero_and_only_rank_0_reports(tmp_path: Path) -> None:
    run = run_ranks(
        tmp_path,
        """
def test_sum(device):
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    assert total.item() == 2

def test_skipped_everywhere():
    pytest.skip("not here")

@pytest.mark.xfail(strict=True)
def test_expected_failure():
    assert False
""",
    )
    assert (run.exit_code, run.counts) == (0, "1 passed, 1 skipped, 1 xfailed"), run.output


def test_a_failure_on_one_rank_fails_the_run_and_names_the_rank(tmp_path: Path) -> None:
    run = run_ranks(
        tmp_path,
        """
@pytest.fixture
def bad_on_rank_1():
    assert rank != 1, "the fixture of rank 1"

def test_call():
    print(f"printed on rank {rank}")
    assert rank != 1, "the story of rank 1"

def test_setup(bad_on_rank_1):
    dist.barrier()                # rank 0 must not wait here for a rank that never comes

def test_skip():
    if rank == 1:
        pytest.skip("only rank 1")

def test_everywhere():
    assert False, "the same story"

def test_afterwards():
    dist.barrier()
""",
    )
    assert run.exit_code != 0
    assert run.counts == "3 failed, 1 passed, 1 error", run.output
    assert run.output.count("failed on rank 1 of 2") >= 2
    assert "AssertionError: the story of rank 1" in run.output
    assert "printed on rank 1" in run.output
    assert "AssertionError: the fixture of rank 1" in run.output
    assert re.search(r"ranks disagree.*\n.*rank 0: passed\n.*rank 1: skipped Skipped: only rank 1", run.output)
    assert re.search(r"failed on ranks 0, 1 of 2\n--- ranks 0, 1 ---", run.output)


def test_a_rank_that_fails_before_a_collective_ends_the_run(tmp_path: Path) -> None:
    run = run_ranks(
        tmp_path,
        """
def test_parting():
    assert rank != 1, "the story of rank 1"
    dist.all_reduce(torch.ones(1))

def test_never_reached():
    assert False, "reached"
""",
        timeout_s=SHORT_TIMEOUT_S,
    )
    assert run.exit_code != 0
    assert run.counts == "1 failed", run.output
    assert "AssertionError: the story of rank 1" in run.output
    assert "left the process group broken" in run.output


def test_a_rank_that_starts_late_is_waited_for_and_when_it_hangs_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p late\n")
    (tmp_path / "late.py").write_text(f"{HEADER}\ntime.sleep(rank * {SHORT_TIMEOUT_S + 1})\n")
    run = run_ranks(
        tmp_path,
        """
def test_hang():
    if rank == 1:
        time.sleep(1000)
""",
        timeout_s=SHORT_TIMEOUT_S,
        launcher=True,
    )
    assert run.exit_code != 0
    assert "rank 1 did not report within" in run.output, run.output
    assert "in test_hang" in run.output  # the stack of the rank that the launcher had to end


def test_a_rank_that_dies_ends_the_run_and_is_named_by_the_launcher(tmp_path: Path) -> None:
    run = run_ranks(
        tmp_path,
        """
def test_death():
    if rank == 1:
        os._exit(9)
    dist.barrier()
""",
        launcher=True,
    )
    assert run.exit_code != 0
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)\s+exitcode\s*: 9", run.output), run.output


def test_ranks_that_collect_different_tests_are_refused(tmp_path: Path) -> None:
    run = run_ranks(
        tmp_path,
        """
def test_common():
    dist.barrier()

if rank == 1:
    def test_alone():
        dist.barrier()
""",
    )
    assert run.exit_code != 0
    assert "rank 0 has 1, rank 1 has 2" in run.output, run.output
    assert "test_generated.py::test_alone" in run.output


def test_a_collection_error_on_one_rank_is_named(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, "assert rank != 1, 'no such module on rank 1'\ndef test_common():\n    dist.barrier()\n")
    assert run.exit_code != 0
    assert "collection failed on rank 1 only" in run.output, run.output
    assert "no such module on rank 1" in run.output


def test_without_torchrun_it_is_an_ordinary_run_of_one_rank(tmp_path: Path) -> None:
    tests = """
def test_world(device):
    assert dist.get_world_size() == 1

def test_failure():
    assert False, "the only story"
"""
    run = run_ranks(tmp_path, tests, num_ranks=1)
    assert (run.exit_code, run.counts) == (1, "1 failed, 1 passed"), run.output
    assert "failed on rank" not in run.output
