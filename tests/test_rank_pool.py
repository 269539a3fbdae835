"""The pool keeps its promises: order, speed, full reports, no wait without an end, nothing left behind."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from patience import PATIENCE_S, wait_until

from dist_optim.testing import RankFailure, RankPool, assert_equal
from dist_optim.testing.native import OUT_OF_TIME


@pytest.fixture
def doomed_pool() -> Iterator[RankPool]:
    """Three ranks of a test's own, to break."""
    with RankPool(world_size=3, timeout_s=PATIENCE_S) as pool:
        yield pool


def test_results_come_in_rank_order(three_ranks: RankPool) -> None:
    assert three_ranks.run(_late_when_low) == [0, 1, 2]


def _late_when_low() -> int:
    time.sleep(0.02 * (dist.get_world_size() - dist.get_rank()))
    return dist.get_rank()


def test_ranks_form_one_group_and_know_their_place(two_ranks: RankPool) -> None:
    for rank, (total, environment, num_threads) in enumerate(two_ranks.run(_describe_place)):
        assert total == 1.0 + 2.0
        assert environment == (str(rank), "2", str(rank))
        assert num_threads == 1


def _describe_place() -> tuple[float, tuple[str, ...], int]:
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    environment = tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return total.item(), environment, torch.get_num_threads()


def test_tensors_and_keywords_travel_both_ways(two_ranks: RankPool) -> None:
    full = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    for result in two_ranks.run(_scale, {"weights": [full, full[0]]}, factor=3):
        assert_equal(result, {"weights": [full * 3, full[0] * 3]})


def _scale(tensors: dict[str, list[torch.Tensor]], *, factor: int) -> dict[str, list[torch.Tensor]]:
    return {name: [tensor * factor for tensor in values] for name, values in tensors.items()}


def test_every_body_starts_from_the_same_seed(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(torch.rand, 3), two_ranks.run(torch.rand, 3)
    assert_equal([*first, *second], [first[0]] * 4)


def test_a_failing_rank_is_named_with_its_traceback(doomed_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1 raised; ranks 0, 2 still waiting") as caught:
        doomed_pool.run(_fail_on_rank, 1)
    assert "ValueError: the story of rank 1" in caught.value.tracebacks[1]
    assert "in _fail_on_rank" in caught.value.tracebacks[1]
    for rank in (0, 2):
        assert "in barrier" in caught.value.still_running[rank]
        assert "in _fail_on_rank" in caught.value.still_running[rank]
    assert "the story of rank 1" in str(caught.value)


def _fail_on_rank(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise ValueError(f"the story of rank {failing_rank}")
    dist.barrier()


def test_failures_of_all_ranks_are_all_reported(doomed_pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_optim.testing.pool.OTHERS_MAY_REPORT_S", 30.0)  # however busy the machine is
    with pytest.raises(RankFailure, match="ranks 0, 1, 2 raised") as caught:
        doomed_pool.run(_fail_alone)
    assert [f"alone on {rank}" in caught.value.tracebacks[rank] for rank in range(3)] == [True] * 3


def _fail_alone() -> None:
    sys.exit(f"alone on {dist.get_rank()}")  # not an Exception, and still reported


def test_a_fresh_pool_works_after_a_failure(doomed_pool: RankPool) -> None:
    before = doomed_pool.run(os.getpid)
    with pytest.raises(RankFailure):
        doomed_pool.run(_fail_on_rank, 0)
    after = doomed_pool.run(os.getpid)
    assert set(before).isdisjoint(after)
    assert not any(_is_running(process_id) for process_id in before)


@pytest.mark.parametrize(
    ("means", "description"),
    [
        ("exit", "rank 2 died: its process ended with exit code 3"),
        ("kill", "rank 2 died: its process was ended by SIGKILL"),
    ],
)
def test_a_rank_that_dies_is_named_at_once(doomed_pool: RankPool, means: str, description: str) -> None:
    with pytest.raises(RankFailure, match=f"(?s)_die_on_rank failed .*{description}"):  # not: did not end in 30 s
        doomed_pool.run(_die_on_rank, 2, means)


def _die_on_rank(dying_rank: int, means: str) -> None:
    if dist.get_rank() == dying_rank:
        if means == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_crash_is_reported_with_its_python_stack_and_all_native_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the report looks for a core dump, if the kernel writes them beside the process
    with RankPool(2, timeout_s=PATIENCE_S) as pool, pytest.raises(RankFailure, match="rank 1 died; rank 0 ") as caught:
        pool.run(_crash_on_rank, 1, tmp_path)
    report = caught.value
    assert list(report.crashes) == [1]
    for words in ("SIGSEGV", "Fatal Python error: Segmentation fault", "in string_at", "in _crash_on_rank"):
        assert words in str(report)
    cores = list(tmp_path.glob("core*"))
    if _gdb_can_attach():
        assert "gloo" in report.native_stacks[0] or OUT_OF_TIME in report.native_stacks[0]
        assert not cores or "string_at" in report.native_stacks[1] or OUT_OF_TIME in report.native_stacks[1]
    for core in cores:
        core.unlink()  # hundreds of megabytes


def _gdb_can_attach() -> bool:
    """Whether it is installed, and this machine lets it look into a process of ours."""
    if shutil.which("gdb") is None:
        return False
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        line = ["gdb", "-nx", "-batch", "-p", str(child.pid)]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S)
        child.kill()
    return "ptrace" not in done.stderr


def _crash_on_rank(crashing_rank: int, directory: Path) -> None:
    if dist.get_rank() == crashing_rank:
        os.chdir(directory)
        limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
        ctypes.string_at(0)
    dist.barrier()


def test_a_crash_between_bodies_is_reported_with_its_stack(doomed_pool: RankPool) -> None:
    os.kill(doomed_pool.run(_process_id_without_core_dump)[1], signal.SIGABRT)
    wait_until(lambda: bool(doomed_pool.dead_ranks))
    with pytest.raises(RankFailure, match="rank 1 died") as caught:
        doomed_pool.run(dist.get_rank)
    assert "in worker_main" in caught.value.crashes[1]


def _process_id_without_core_dump() -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return os.getpid()


def test_a_rank_that_died_between_bodies_is_named(doomed_pool: RankPool) -> None:
    os.kill(doomed_pool.run(os.getpid)[1], signal.SIGKILL)
    wait_until(lambda: bool(doomed_pool.dead_ranks))
    with pytest.raises(RankFailure, match="after the previous body had returned: rank 1 died"):
        doomed_pool.run(dist.get_rank)


def test_a_rank_that_hangs_in_a_collective_runs_out_of_time(doomed_pool: RankPool) -> None:
    doomed_pool.run(dist.get_rank)
    with pytest.raises(
        RankFailure, match="_leave_early did not end within 5 s on 3 .*: rank 0 still waiting"
    ) as caught:
        doomed_pool.run(_leave_early, timeout_s=5.0)
    assert list(caught.value.still_running) == [0]
    assert "in all_reduce" in caught.value.still_running[0]


def _leave_early() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))


def test_ranks_persist_and_a_body_starts_nothing(two_ranks: RankPool) -> None:
    process_ids = two_ranks.run(os.getpid)
    assert process_ids == two_ranks.process_ids
    with mock.patch.object(RankPool, "_start_worker", side_effect=AssertionError("a process was started")):
        for _ in range(21):
            assert two_ranks.run(os.getpid) == process_ids


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        RankPool(world_size=0)
    num_gpus = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"there are {num_gpus} GPUs"):
        RankPool(world_size=num_gpus + 1, backend="nccl")


PARENT_THAT_NEVER_RETURNS = """
import sys, time
from dist_optim.testing import RankPool

if __name__ == "__main__":
    pool = RankPool(world_size=2)
    pool.run(time.time)
    print(*pool.process_ids, flush=True)
    pool.run(time.sleep, 50)
"""


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT_THAT_NEVER_RETURNS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    process_ids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    assert len(process_ids) == 2
    wait_until(lambda: not any(_is_running(process_id) for process_id in process_ids))


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process_id}/stat")  # an ended process nobody has waited for still takes signals
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
