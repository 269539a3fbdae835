"""Ranks shared by all tests, and the summary of what was skipped and why."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing import forkserver

import psutil
import pytest
import torch

from dist_optim.proving.cache import VARIABLE
from dist_optim.testing import RankPool

MOST_THREADS = 50
"""Of a rank: each process group that a body leaves behind has three, and gloo's wakes up a hundred times a second."""
BODY_TIMEOUT_S = 300.0  # for a machine that others use too; below pytest's own, so that the ranks' stacks are told
_pools: dict[int, RankPool] = {}

# One thread, as in the ranks: a reference computed here then sums in the same order as the subject does there.
torch.set_num_threads(1)

# Verdicts are kept for the ranks of this run alone, not in the user's folder: no test may depend on an earlier run.
_proofs = tempfile.TemporaryDirectory(prefix="proofs")
os.environ[VARIABLE] = _proofs.name


collect_ignore = [] if find_spec("peft") else ["test_peft.py"]
"""It is run by test_with_peft.py, in a process that sees peft."""

IMPORTED_BY_MOST_BODIES = (
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "pytest"),
    *("accelerate", "deepspeed", "bitsandbytes", "pytorch_optimizer", "torchao.optim"),
    *("transformers.models.llama.modeling_llama", "dist_optim.integrations.transformers"),
)


def _shared_pool(world_size: int) -> RankPool:
    if not _pools:  # ranks are forks of one process, which then has imported this once, and not each of them
        multiprocessing.set_forkserver_preload([*IMPORTED_BY_MOST_BODIES])
        forkserver.ensure_running()
    return _pools.setdefault(world_size, RankPool(world_size, timeout_s=BODY_TIMEOUT_S))


def pytest_collection_finish() -> None:
    """As in the ranks: what was imported is no garbage, and engines that collect need not walk it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _close_pools_at_the_end() -> Iterator[None]:
    yield
    for pool in _pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def _no_rank_is_left_dead() -> Iterator[None]:
    """Blame the test after which a shared rank is gone, not the innocent one that would meet it next."""
    yield
    for world_size, pool in _pools.items():
        if dead := pool.dead_ranks:
            crashes = "".join(f"\nrank {rank}:\n{stacks}" for rank, stacks in pool.crashes.items())
            pool.close()
            pytest.fail(f"This test left dead ranks in the pool of {world_size} (rank: exit code): {dead}{crashes}")


@pytest.fixture(scope="module", autouse=True)
def _groups_do_not_pile_up() -> Iterator[None]:
    """Let ranks with many threads end; the next test that wants such a pool starts it anew."""
    yield
    for pool in _pools.values():
        if any(psutil.Process(number).num_threads() > MOST_THREADS for number in pool.process_ids):
            pool.close()


@pytest.fixture(scope="session")
def one_rank() -> RankPool:
    """A pool of one rank; it starts at its first use."""
    return _shared_pool(1)


@pytest.fixture(scope="session")
def two_ranks() -> RankPool:
    """A pool of two ranks; it starts at its first use."""
    return _shared_pool(2)


@pytest.fixture(scope="session")
def three_ranks() -> RankPool:
    """A pool of three ranks: a world size that divides little."""
    return _shared_pool(3)


@pytest.fixture(scope="session")
def four_ranks() -> RankPool:
    """A pool of four ranks; it starts at its first use."""
    return _shared_pool(4)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests by reason, always: a skip nobody sees is a test nobody runs."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped: {reasons.total()} ({listed})")


def _reason(report: pytest.TestReport) -> str:
    """The text given to skip: pytest keeps it as (file, line, "Skipped: text")."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    return text.removeprefix("Skipped: ")
