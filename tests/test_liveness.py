"""Ranks that are stopped, killed, failed or gone, in jobs of their own: the others end, and name them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from patience import PATIENCE_S
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.errors import HyperparameterError, RanksDisagreeError
from dist_optim.ranks import liveness
from dist_optim.ranks.liveness import VARIABLE, timeout_of, watch_ranks
from dist_optim.testing import RankPool

TIMEOUT_S = 4.0
STEP_OF_TROUBLE = 10
LAST_STEP = 20


# --- what a rank does in the step of trouble


def nothing() -> None:
    """Go on."""


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise ValueError("bad luck")


def waits_in_python() -> None:
    time.sleep(2 * TIMEOUT_S)


def holds_the_interpreter(seconds: float = 2 * TIMEOUT_S) -> None:
    """A call of C that lets no other thread run."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def holds_the_interpreter_for_a_while() -> None:
    holds_the_interpreter(TIMEOUT_S / 2)


def leaves() -> None:
    sys.exit()


# --- a job of its own


@dataclass(frozen=True)
class Job:
    """Ranks that train, with their output."""

    processes: list[BaseProcess]
    directory: Path

    def wait(self, *ranks: int) -> list[int | None]:
        """The exit codes of ranks, once they have ended."""
        deadline = time.monotonic() + PATIENCE_S
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def output(self, rank: int) -> str:
        return (self.directory / f"rank{rank}").read_text()

    def name(self, rank: int) -> str:
        return f"rank {rank} (host {socket.gethostname()}, pid {self.processes[rank].pid})"


@contextmanager
def job(directory: Path, num_ranks: int, trouble: Callable[[], None], *ranks: int, **options: Any) -> Iterator[Job]:
    """Ranks that train together; the given ones get into trouble."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch.nn.parallel", "dist_optim"])
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(num_ranks):
        given = (directory, port, rank, num_ranks, trouble if rank in ranks else nothing, options)
        processes.append(context.Process(target=run_rank, args=given, daemon=True))
        processes[-1].start()
    try:
        yield Job(processes, directory)
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def run_rank(
    directory: Path, port: int, rank: int, num_ranks: int, trouble: Callable[[], None], options: dict[str, Any]
) -> None:
    """What an interpreter does with a script: uncaught exceptions go to the hook, and end it with 1."""
    output = os.open(directory / f"rank{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ[VARIABLE] = str(options.get("timeout_s", TIMEOUT_S))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store: dist.Store = (
        dist.FileStore(str(directory / "store"), num_ranks)
        if options.get("store") == "file"
        else dist.TCPStore("localhost", port, num_ranks, rank == 0)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        for step, take_step in enumerate(steps_of(options.get("body", "all_reduce"))):
            take_step()
            if step == options.get("step", STEP_OF_TROUBLE):
                trouble()
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def steps_of(body: str) -> Iterator[Callable[[], None]]:
    """The steps of a watched job. Training is seconds of imports, so most tests do with a collective."""
    if body == "all_reduce":
        watch_ranks()
        yield from [lambda: dist.all_reduce(torch.ones(3))] * LAST_STEP
        return
    model = DistributedDataParallel(nn.Linear(4, 4))
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, print_audit=False)

    def train() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    yield from [train] * LAST_STEP


# --- what the others say


@pytest.mark.parametrize(("store", "body"), [("tcp", "training"), ("file", "all_reduce")])
def test_a_stopped_rank_is_named_by_all_others_and_learns_it_when_it_goes_on(
    tmp_path: Path, store: str, body: str
) -> None:
    with job(tmp_path, 3, stops, 1, store=store, body=body) as started:
        assert started.wait(0, 2) == [1, 1]
        for rank in (0, 2):
            said = started.output(rank)
            assert f"{started.name(1)} has not been heard from for 4 s: its process is stopped" in said, said
            assert f"R{started.name(rank)[1:]} ends." in said
        os.kill(started.processes[1].pid or 0, signal.SIGCONT)
        # Rank 0 has taken the store with it, where it served it.
        assert started.wait(1) == [1]
        assert "has not been heard from for 4 s" in started.output(1) or store == "tcp"


def test_the_stopped_rank_that_serves_the_store_is_named(tmp_path: Path) -> None:
    with job(tmp_path, 3, stops, 0) as started:
        assert started.wait(1, 2) == [1, 1]
        for rank in (1, 2):
            said = started.output(rank)
            assert f"{started.name(0)} has not been heard from for 4 s: its process is stopped" in said, said


def test_a_rank_that_holds_the_interpreter_for_too_long_is_named(tmp_path: Path) -> None:
    with job(tmp_path, 2, holds_the_interpreter, 1) as started:
        assert started.wait(0) == [1]
        assert f"{started.name(1)} has not been heard from for 4 s: its process is alive" in started.output(0)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank_is_named(tmp_path: Path, rank: int) -> None:
    with job(tmp_path, 2, is_killed, rank, timeout_s=PATIENCE_S) as started:
        assert started.wait(0, 1) == ([1, -9] if rank == 1 else [-9, 1])
        said = started.output(1 - rank)
        assert f"RankLostError: {started.name(rank)} has " in said, said
        assert "killed, " in said and "crashed" in said
        assert "by peer" in said, "the connection's own error is its cause, and stays"


@pytest.mark.parametrize("rank", [1, 0])
def test_a_failed_rank_is_named_with_its_error(tmp_path: Path, rank: int) -> None:
    with job(tmp_path, 2, raises, rank, timeout_s=PATIENCE_S) as started:
        assert started.wait(0, 1) == [1, 1]
        said = started.output(1 - rank)
        assert f"{started.name(rank)} failed: ValueError: bad luck" in said, said
        own = started.output(rank)
        assert "ValueError: bad luck" in own and "dist_optim:" not in own and "RankLostError" not in own


@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_left_too_early_is_named(tmp_path: Path, rank: int) -> None:
    with job(tmp_path, 2, leaves, rank, timeout_s=PATIENCE_S) as started:
        assert started.wait(0, 1) == ([1, 0] if rank == 1 else [0, 1])
        assert f"{started.name(rank)} left in good order, while others still waited" in started.output(1 - rank)


# --- what nobody is accused of


@pytest.mark.parametrize("trouble", [waits_in_python, holds_the_interpreter_for_a_while])
def test_a_rank_that_is_busy_is_heard_from(tmp_path: Path, trouble: Callable[[], None]) -> None:
    with job(tmp_path, 2, trouble, 1) as started:
        assert started.wait(0, 1) == [0, 0]
        assert [started.output(rank) for rank in (0, 1)] == ["", ""]


def test_ranks_that_were_stopped_together_go_on(tmp_path: Path) -> None:
    """A machine that was suspended: no rank takes the time in which it did not run itself for the others' silence."""
    with job(tmp_path, 2, stops, 0, 1, store="file") as started:
        deadline = time.monotonic() + PATIENCE_S
        while {psutil.Process(one.pid).status() for one in started.processes} != {psutil.STATUS_STOPPED}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2 * TIMEOUT_S)
        for one in started.processes:
            os.kill(one.pid or 0, signal.SIGCONT)
        assert started.wait(0, 1) == [0, 0]
        assert [started.output(rank) for rank in (0, 1)] == ["", ""]


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_is_accused_of_having_left(tmp_path: Path, rank: int) -> None:
    """One goes on alone after the last step, for longer than the timeout; rank 0 takes the store with it."""
    with job(tmp_path, 2, waits_in_python, rank, step=LAST_STEP - 1) as started:
        assert started.wait(0, 1) == [0, 0]
        assert [started.output(rank) for rank in (0, 1)] == ["", ""]


def test_without_a_watch_nothing_is_noticed(tmp_path: Path) -> None:
    """The control: what the tests above see is the watch's."""
    with job(tmp_path, 2, stops, 1, timeout_s=0) as started:
        started.processes[0].join(3 * TIMEOUT_S)
        assert started.processes[0].exitcode is None and started.output(0) == ""


# --- the watch in a process


def watching_threads() -> int:
    for _ in range(3):
        model = DistributedDataParallel(nn.Linear(4, 4))
        dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, print_audit=False)
    return sum(thread.name.startswith("dist_optim-") for thread in threading.enumerate())


def test_a_process_has_one_watch_however_many_optimizers(two_ranks: RankPool) -> None:
    assert two_ranks.run(watching_threads) == [2, 2]


def watch_with(timeout_of_rank: list[Any]) -> str:
    before, liveness._asked = liveness._asked, set()
    try:
        watch_ranks(timeout_s=timeout_of_rank[dist.get_rank()])
    except (HyperparameterError, RanksDisagreeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        liveness._asked = before
    return ""


def test_ranks_refuse_together(two_ranks: RankPool) -> None:
    for message in two_ranks.run(watch_with, [60.0, 30.0]):
        assert message.startswith("RanksDisagreeError") and "60 s on rank 0 and 30 s on rank 1" in message
    for message in two_ranks.run(watch_with, [60.0, -1.0]):
        assert message.startswith("HyperparameterError") and "rank_timeout_s=-1.0" in message


class TestTimeout:
    def test_the_argument_comes_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(VARIABLE, raising=False)
        assert timeout_of() == 120
        monkeypatch.setenv(VARIABLE, "30")
        assert (timeout_of(), timeout_of(60), timeout_of(0)) == (30, 60, 0)

    @pytest.mark.parametrize("value", ["soon", "-1", "1", "nan", "inf", "1e400"])
    def test_other_values_are_refused(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(HyperparameterError, match=VARIABLE):
            timeout_of()
