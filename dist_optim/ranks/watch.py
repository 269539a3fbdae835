"""The watch over a set of ranks: each beats, each looks at its successor, and all learn of what one of them finds.

Ranks stand in a ring. Each writes a counter of its own into the job's store and reads that of its successor; so a
silent rank, or a whole silent host, always has a living predecessor, and a rank's traffic does not grow with their
number. Who finds a silent rank publishes it, and all ranks end with the same line.

Two threads: `talker` does all that touches the store, and may block in it (a TCPStore whose server is stopped does not
answer, and its client keeps to no timeout); `judge` never blocks, notices when the talker does, and ends the process.

Silence is measured on a clock that counts only while this process itself runs: one that was stopped, or held the
interpreter lock for minutes, does not take that time for the silence of others.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dist_optim.errors import RankLostError
from dist_optim.ranks.board import LEFT, Board, Kind, News
from dist_optim.ranks.rank_process import Condition, RankProcess
from dist_optim.ranks.whereabouts import Lookout

__all__ = ["Verdict", "Watch"]

TICK_S = 0.25
POLL_S = 1.0  # between two looks at the news
SHORTEST_BEAT_S = 0.5
MAX_POLLS_A_SECOND = 1024  # of all ranks together: with more ranks, each polls less often
ALARM_S = 5.0  # silence that is enough once a connection was lost
GRACE_S = 2.0  # for the main thread to come back from where it is
OWN_ERROR_S = 1.0  # for an error of this rank's own, after another rank ended or failed
ENDING_S = 30.0  # for a main thread that came back to end the process itself
ASKED_S = 10.0  # for which a rank says where it is, after another one asked
MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the job is over; when this process says so, and when it ends for it, on the watch's clock."""

    text: str
    said_at: float
    ends_at: float


class Watch:
    """One process's part in the watch over ``processes``.

    Args:
        board: Its own client of the store; the first beat of every rank is on it.
        processes: The ranks that watch each other, the same list on each.
        position: Which of them this process is.
        timeout_s: Silence after which a rank is given up.
        rank_0_serves: Whether the store ends with the process of the job's rank 0.
        world: The default process group; the watch ends with it.
    """

    def __init__(
        self,
        board: Board,
        processes: Sequence[RankProcess],
        position: int,
        *,
        timeout_s: float,
        rank_0_serves: bool,
        world: dist.ProcessGroup,
    ) -> None:
        self.board = board
        self.timeout_s = timeout_s
        self.verdict: Verdict | None = None
        self._own = processes[position]
        self._by_rank = {one.rank: one for one in processes}
        self._rank_0 = self._by_rank.get(0)
        self._rank_0_serves = rank_0_serves
        self._ring = [*processes[position + 1 :], *processes[:position]]  # successors, the next one first
        self._neighbours = {one.rank: one for one in (self._ring[0], self._ring[-1])}
        self._serves_store = rank_0_serves and self._own.rank == 0
        self._world = weakref.ref(world)
        self._main_thread = threading.get_ident()
        self._poll_s = min(max(POLL_S, len(processes) / MAX_POLLS_A_SECOND), timeout_s / 4)
        self._beat_s = max(SHORTEST_BEAT_S, timeout_s / 20)
        self._count = 1
        self._now = 0.0  # the clock; only the judge advances it
        self._next_beat = 0.0
        self._last_contact = 0.0
        self._seen = ("", 0.0)  # the successor's counter, and when it last moved
        self._snapshot: dict[int, str] = {}
        self._gone: list[RankProcess] = []
        self._alarm_ends = 0.0
        self._lookout = Lookout(self._main_thread)
        self._asked_until, self._last_asked = 0.0, 0
        self._outbox: list[News] = []
        self._is_closed = False  # rank 0 has said that the store ends with it
        self._has_lost_store = False
        self._main_explains = False
        self._is_said = False
        self._is_asked = False
        self._wake, self._leaving, self._talked, self._over, self._known = (threading.Event() for _ in range(5))
        self._threads = [
            threading.Thread(target=run, name=f"dist_optim-{run.__name__.strip('_')}", daemon=True)
            for run in (self._talker, self._judge)
        ]

    def start(self) -> None:
        """Start watching, and being watched."""
        for thread in self._threads:
            thread.start()

    @property
    def is_on(self) -> bool:
        """Whether this process is still watched."""
        return not self._leaving.is_set() and not self._over.is_set()

    def leave(self) -> None:
        """Tell the others that this process leaves in good order; at most some seconds, however the store does."""
        self._leaving.set()
        self._wake.set()
        self._threads[0].join(self._closing_s + GRACE_S)
        self._over.set()
        self._threads[1].join(GRACE_S)

    def report(self, text: str) -> None:
        """Tell the others that this process ends with an error, and wait until that is on the board; some seconds."""
        self._main_explains = True
        self._send(News(kind=Kind.FAILED, rank=self._own.rank, text=text))

    def main_ends(self) -> None:
        """The main thread ends this process, by an error of its own: the judge need not, for ``ENDING_S``."""
        self._main_explains = True

    def ask_where(self) -> int:
        """Have all ranks say where they are, from now on for some seconds. Local, and does not wait.

        Returns:
            The place of the question among the news: answers that have read so far are to it. 0 until it is known.
        """
        if self._now >= self._asked_until and not any(one.kind is Kind.ASK for one in self._outbox):
            self._outbox.append(News(kind=Kind.ASK, rank=self._own.rank))
            self._wake.set()
        return self._last_asked if self._now < self._asked_until else 0

    @property
    def ranks(self) -> frozenset[int]:
        """Who watches each other."""
        return frozenset(self._by_rank)

    def ask(self) -> Verdict | None:
        """After a lost connection: have the missing rank found. Blocks for some seconds, unless it is known already.

        With an answer the caller is expected to end this process, in ``ENDING_S`` at the latest.
        """
        self._main_explains = self._is_asked = True
        if self._has_lost_store:
            self._decide(Kind.LOST, self._store_text())
        if self.verdict is None and self.is_on:
            self._send(News(kind=Kind.ALARM, rank=self._own.rank))
            self._known.wait(self._alarm_s)
        elif self.verdict is None and self._gone:
            self._decide(Kind.GONE, self._gone_text())
        self._main_explains = self.verdict is not None
        return self.verdict

    # --- the talker

    def _talker(self) -> None:
        try:
            while not self._leaving.is_set() and not self._is_closed:
                self._round()
                self._wake.wait(min(self._poll_s, SHORTEST_BEAT_S) if self._alarmed else self._poll_s)
                self._wake.clear()
            if not self._is_closed:
                self._say_goodbye()
        except RuntimeError:
            # A broken connection is not mended: whoever served the store has ended. torch logs it at length, once.
            self._has_lost_store = True
            if self._rank_0 is None:  # who serves the store is none of these ranks, and may leave when it likes
                self._over.set()
            elif self._is_asked and not self._leaving.is_set():
                self._decide(Kind.LOST, self._store_text())
        finally:
            self._talked.set()

    def _round(self) -> None:
        if self._now >= self._next_beat or self._alarmed:
            self._next_beat = self._now + self._beat_s
            self._count += 1
            self.board.beat(self._own.rank, str(self._count))
            self._look_at_successor()
        if self._alarmed and self._gone and self.verdict is None:
            self._tell(News(kind=Kind.GONE, rank=self._gone[0].rank, text=self._gone_text()))
        for one in self.board.news():
            self._learn(one)
        self._look_at_neighbours()
        while self._outbox:
            self._tell(self._outbox.pop(0))
        if self._now < self._asked_until:
            self.board.say_where(self._own.rank, self._lookout.look(self.board.num_read).to_text())
        self._last_contact = self._now
        self._talked.set()

    def _look_at_successor(self) -> None:
        if not self._ring:
            return
        successor = self._ring[0]
        value, (seen, moved_at) = self.board.beat_of(successor.rank), self._seen
        if value == LEFT:
            self._gone.append(self._ring.pop(0))
            self._forget()
            self._look_at_successor()
        elif value != seen:
            self._seen, self._snapshot = (value, self._now), {}
        elif self._now - moved_at >= self._patience_s / 2 and not self._snapshot:
            self._snapshot = self.board.beats_of(one.rank for one in self._ring)
        elif self._now - moved_at >= self._patience_s:
            self._accuse(successor)

    def _forget(self) -> None:
        self._seen, self._snapshot = ("", self._now), {}

    def _accuse(self, successor: RankProcess) -> None:
        """Publish the successor, and who else has not moved since it fell under suspicion."""
        now = self.board.beats_of(self._snapshot)
        silent = [self._by_rank[rank] for rank, value in self._snapshot.items() if now[rank] == value != LEFT]
        if successor in silent:
            verb = "has" if len(silent) == 1 else "have"
            text = f"{_named(silent)} {verb} not been heard from for {self._patience_s:g} s{_why(successor)}"
            self._tell(News(kind=Kind.LOST, rank=successor.rank, text=text))

    def _look_at_neighbours(self) -> None:
        """Ranks of this machine whose process is gone: known at once, without waiting for their silence."""
        for rank, neighbour in list(self._neighbours.items()):
            if neighbour.condition() is not Condition.ENDED:
                continue
            del self._neighbours[rank]
            if self.board.beat_of(rank) != LEFT:
                text = f"{neighbour} has ended without a word: killed, out of memory, or crashed"
                self._tell(News(kind=Kind.ENDED, rank=rank, text=text))

    def _tell(self, news: News) -> None:
        self.board.publish(news)
        for one in self.board.news():
            self._learn(one)

    def _learn(self, news: News) -> None:
        if news.kind is Kind.CLOSING and news.rank != self._own.rank:
            self.board.count_gone(1)
            self._gone = [self._by_rank[news.rank]]
            self._is_closed = True
            if self.verdict is None:
                self._over.set()
        elif news.kind is Kind.ALARM:
            self._alarm_ends = self._now + self._alarm_s
            self._forget()
        elif news.kind is Kind.ASK:
            self._asked_until, self._last_asked = self._now + ASKED_S, self.board.num_read
        elif news.kind is Kind.FAILED:
            if news.rank != self._own.rank:
                self._decide(news.kind, f"{self._by_rank[news.rank]} failed: {news.text}")
        elif news.kind is not Kind.CLOSING:
            self._decide(news.kind, news.text)

    def _gone_text(self) -> str:
        return f"{_named(self._gone)} left in good order, while others still waited. Give all ranks as many steps"

    def _say_goodbye(self) -> None:
        while self._outbox:
            self._tell(self._outbox.pop(0))
        self.board.beat(self._own.rank, LEFT)
        num_gone = self.board.count_gone(1)
        if not self._serves_store or self.verdict is not None:
            return
        # The store ends with this process: first let the others learn that this is no accident.
        self.board.publish(News(kind=Kind.CLOSING, rank=self._own.rank))
        deadline = time.monotonic() + self._closing_s
        while num_gone < len(self._by_rank) and time.monotonic() < deadline:
            time.sleep(0.05)
            num_gone = self.board.count_gone(0)

    @property
    def _alarm_s(self) -> float:
        return ALARM_S + 3 * self._poll_s

    @property
    def _alarmed(self) -> bool:
        return self._now < self._alarm_ends

    @property
    def _closing_s(self) -> float:
        return 2 * self._poll_s + 1 if self._serves_store else GRACE_S

    @property
    def _patience_s(self) -> float:
        return min(self.timeout_s, ALARM_S) if self._alarmed else self.timeout_s

    # --- the judge

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            self._now += min(now - before, 2 * TICK_S)
            before = now
            if not dist.is_initialized() or dist.group.WORLD is not self._world():
                self._leaving.set()
                self._wake.set()
                return
            if self._leaving.is_set():
                return
            if self._now - self._last_contact >= self.timeout_s:
                self._decide(Kind.LOST, self._store_text())
            if self.verdict is not None:
                self._act_on(self.verdict)

    def _decide(self, kind: Kind, text: str) -> None:
        """The first verdict is the one: all ranks read the news in the same order."""
        if self.verdict is None:
            # Where a rank ended or failed, the others most often get an error of their own at once: that comes first.
            said_at = self._now + (0.0 if kind is Kind.LOST else OWN_ERROR_S)
            ends_at = self._now + self.timeout_s if kind in (Kind.ENDED, Kind.GONE) else said_at
            self.verdict = Verdict(text, said_at, ends_at)
            self._known.set()

    def _act_on(self, verdict: Verdict) -> None:
        if self._main_explains:
            if self._now >= verdict.ends_at + ENDING_S:
                os._exit(1)
            return
        if self._now >= verdict.said_at and not self._is_said:
            self._is_said = True
            say(self.line(verdict))
        if self._now >= verdict.ends_at:
            _raise_in(self._main_thread, self.line(verdict))
            if not self._over.wait(GRACE_S) and not self._main_explains:
                os._exit(1)

    def _store_text(self) -> str:
        """Why there is no store any more: closed by the end of who serves it, or silent."""
        where = "torchrun's agent, or the file, that is the job's store"
        if self._rank_0_serves:
            where = "rank 0" if self._rank_0 is None else str(self._rank_0)
        elif self._rank_0 is not None:
            where += f" (beside {self._rank_0})"
        if self._has_lost_store:
            return f"{where} has closed the job's store without a word: killed, or crashed"
        why = _why(self._rank_0) if self._rank_0_serves and self._rank_0 is not None else ""
        return f"{where} has not been heard from for {self.timeout_s:g} s{why}"

    def line(self, verdict: Verdict) -> str:
        """The verdict in one line, with what to do."""
        return (
            f"{verdict.text}. R{str(self._own)[1:]} ends. Look at what is named first, then resume from the "
            "last checkpoint. rank_timeout_s or DIST_OPTIM_RANK_TIMEOUT_S sets how many seconds ranks wait for each "
            "other (0: no watch)."
        )

    def _send(self, news: News) -> None:
        self._talked.clear()
        self._outbox.append(news)
        self._wake.set()
        deadline = time.monotonic() + 3 * GRACE_S
        while self._outbox and self._threads[0].is_alive() and time.monotonic() < deadline:
            self._talked.wait(0.05)
            time.sleep(0.01)


def say(text: str) -> None:
    """One line on stderr, at once."""
    print(f"dist_optim: {text}", file=sys.stderr, flush=True)


def _named(processes: Sequence[RankProcess]) -> str:
    named = ", ".join(str(one) for one in processes[:MAX_NAMED])
    return named if len(processes) <= MAX_NAMED else f"{named} and {len(processes) - MAX_NAMED} more"


def _why(process: RankProcess) -> str:
    condition = process.condition()
    if condition is Condition.UNKNOWN:
        return ": its process is stopped or was killed, or its host or the network to it is down"
    return f": its process {condition.value}"


def _raise_in(thread_id: int, text: str) -> None:
    """Have a thread raise RankLostError at its next Python instruction, if it comes to one."""

    class Lost(RankLostError):
        def __init__(self) -> None:
            super().__init__(text)

    Lost.__name__, Lost.__qualname__, Lost.__module__ = "RankLostError", "RankLostError", RankLostError.__module__
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(Lost))
