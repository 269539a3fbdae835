"""The watch without processes: many ranks of one process, round by round, on a clock that the test turns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_optim.ranks.board import LEFT, Board, Kind, News, own_client
from dist_optim.ranks.rank_process import Condition, RankProcess
from dist_optim.ranks.watch import Watch

TIMEOUT_S = 120.0


class World:
    """Ranks that share a store; each has a watch whose threads are not started."""

    def __init__(self, num_ranks: int) -> None:
        store = dist.HashStore()
        processes = [RankProcess(rank, f"host{rank // 8}", 1000 + rank, "", "") for rank in range(num_ranks)]
        self.boards = [Board(store, "watch") for _ in range(num_ranks)]
        for rank, board in enumerate(self.boards):
            board.beat(rank, "1")
        group = Group()
        self.group = group  # a watch holds it weakly
        self.watches = [
            Watch(board, processes, rank, timeout_s=TIMEOUT_S, rank_0_serves=True, world=group)  # type: ignore[arg-type]
            for rank, board in enumerate(self.boards)
        ]

    def pass_seconds(self, seconds: int, silent: set[int] | frozenset[int] = frozenset()) -> None:
        """All ranks but the silent ones go on for some seconds."""
        for _ in range(seconds):
            for rank, watch in enumerate(self.watches):
                if rank not in silent:
                    watch._now += 1
                    watch._round()

    def verdicts(self, silent: set[int]) -> set[str]:
        return {
            watch.verdict.text if watch.verdict else "" for rank, watch in enumerate(self.watches) if rank not in silent
        }


class Group:
    """Stands in for a process group."""


@pytest.mark.parametrize("silent", [{1}, {0}, {7, 8, 9}, {2, 5}, set(range(8, 16)), set(range(15))])
def test_all_living_ranks_name_the_same_silent_ones(silent: set[int]) -> None:
    world = World(16)
    world.pass_seconds(30)
    world.pass_seconds(100, silent)
    assert world.verdicts(silent) == {""}
    world.pass_seconds(40, silent)
    (text,) = world.verdicts(silent)
    named = [rank for rank in range(16) if f"rank {rank} (" in text]
    # The text lists eight, and counts the rest.
    assert set(named) <= silent and len(named) == min(len(silent), 8), text
    assert (f"and {len(silent) - 8} more" in text) == (len(silent) > 8)
    assert "not been heard from for 120 s" in text


def test_a_rank_costs_the_store_the_same_among_few_and_among_many() -> None:
    costs = set()
    for num_ranks in (2, 16, 64):
        world = World(num_ranks)
        world.pass_seconds(10)
        before = [board.num_operations for board in world.boards]
        world.pass_seconds(60)
        costs |= {board.num_operations - count for board, count in zip(world.boards, before, strict=True)}
    # A look at the news each second; a beat and a look at the successor each six.
    assert costs == {60 + 2 * 10}


def test_a_rank_that_left_is_not_accused_and_its_successor_still_watched() -> None:
    world = World(4)
    world.boards[1].beat(1, LEFT)
    world.pass_seconds(300, {1})
    assert world.verdicts({1}) == {""}
    world.pass_seconds(200, {1, 2})
    (text,) = world.verdicts({1, 2})
    assert text.startswith("rank 2 (host host0, pid 1002) has not been heard from")


def test_after_a_lost_connection_silence_is_noticed_sooner() -> None:
    world = World(4)
    world.pass_seconds(20)
    world.boards[0].publish(News(kind=Kind.ALARM, rank=0))
    world.pass_seconds(8, {2})
    (text,) = world.verdicts({2})
    assert "rank 2 (" in text and "for 5 s" in text


def test_an_alarm_without_a_silent_rank_passes() -> None:
    world = World(4)
    world.boards[0].publish(News(kind=Kind.ALARM, rank=0))
    world.pass_seconds(20)
    world.pass_seconds(100, {2})
    assert world.verdicts({2}) == {""}


def test_the_first_of_two_reports_counts_on_every_rank() -> None:
    world = World(3)
    for rank in (2, 1):
        world.boards[rank].publish(News(kind=Kind.FAILED, rank=rank, text=f"error of {rank}"))
    world.pass_seconds(2)
    assert world.watches[0].verdict is not None
    assert world.watches[0].verdict.text == "rank 2 (host host0, pid 1002) failed: error of 2"


def test_a_file_store_gets_a_second_client_that_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "store"
    first = dist.PrefixStore("a", dist.PrefixStore("b", dist.FileStore(str(path), 1)))
    first.set("key", "value")
    second = own_client(first, 5.0)
    assert second is not None
    board = Board(second, "watch")
    board.beat(3, "7")
    assert board.beats_of([3]) == {3: "7"}
    del board, second
    assert path.exists()
    assert own_client(dist.HashStore(), 5.0) is None


def test_the_system_knows_its_own_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        state, started = (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2].split()[0:20:19]
        own = RankProcess.own(0)
        child = RankProcess(1, own.host, process.pid, own.machine, started)
        assert (own.condition(), child.condition()) == (Condition.RUNS, Condition.RUNS)
        os.kill(process.pid, signal.SIGSTOP)
        _until(lambda: child.condition() is Condition.STOPPED)
        process.kill()
        _until(lambda: child.condition() is Condition.ENDED)  # a zombie until it is waited for
    finally:
        process.kill()
        process.wait()
    assert child.condition() is Condition.ENDED
    assert RankProcess(2, "elsewhere", os.getpid(), "another boot", "0").condition() is Condition.UNKNOWN
    assert RankProcess(3, own.host, os.getpid(), own.machine, "0").condition() is Condition.ENDED, "its id was reused"


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
