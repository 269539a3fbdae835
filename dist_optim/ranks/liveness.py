"""Notice a rank that is stopped, killed, cut off or failed while others wait for it in a collective, and name it.

`watch_ranks` starts the watch, once a process and set of ranks (`build_optimizer` calls it). From then on

- a rank that is not heard from for `timeout_s` ends the job: each other rank prints which one, where it runs, and what
  to do, raises RankLostError where its main thread can, and ends with exit code 1 where it cannot;
- a rank whose process is gone is named as soon as another rank loses its connection to it;
- a rank that ends with an uncaught exception tells the others its text, and they end within seconds.

A rank that waits in Python (a debugger's prompt, a long computation) is heard from all the same. One that holds the
interpreter lock in a single call of C for longer than `timeout_s` is not.
"""

from __future__ import annotations

import atexit
import functools
import math
import multiprocessing.util
import os
import sys
import uuid
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dist_optim.errors import HyperparameterError, RankLostError, RanksDisagreeError
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank
from dist_optim.ranks.board import Board, own_client
from dist_optim.ranks.meeting import open_place
from dist_optim.ranks.rank_process import RankProcess
from dist_optim.ranks.together import together
from dist_optim.ranks.watch import Watch
from dist_optim.ranks.whereabouts import Whereabouts

__all__ = ["DEFAULT_TIMEOUT_S", "VARIABLE", "explain", "report_failure", "timeout_of", "watch_ranks"]

VARIABLE = "DIST_OPTIM_RANK_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 120.0
SHORTEST_TIMEOUT_S = 2.0

_watches: list[Watch] = []
_asked: set[frozenset[int]] = set()  # the sets of ranks that have asked for a watch
_asked_in: weakref.ref[dist.ProcessGroup] | None = None  # the default process group of that time
_process: int | None = None  # where the hooks are: a fork inherits them, and must not speak for its parent


def timeout_of(given: float | None = None) -> float:
    """The timeout in seconds that was given, or that the environment sets, or 120; 0 for no watch.

    Raises:
        HyperparameterError: It is not a number of seconds, or too short for a healthy rank to keep.
    """
    source, value = ("rank_timeout_s", given) if given is not None else (VARIABLE, os.environ.get(VARIABLE) or None)
    if value is None:
        return DEFAULT_TIMEOUT_S
    try:
        timeout_s = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        timeout_s = math.nan
    if timeout_s == 0 or SHORTEST_TIMEOUT_S <= timeout_s < math.inf:
        return timeout_s
    raise HyperparameterError(
        f"{source}={value!r} is not a time to wait for a silent rank. Give seconds, {SHORTEST_TIMEOUT_S:g} or more, or "
        "0 for no watch."
    )


def watch_ranks(process_group: dist.ProcessGroup | None = None, timeout_s: float | None = None) -> None:
    """Have the ranks of a process group watch each other until each has left. Calling it again changes nothing.

    Collective: every rank of the group calls it. One rank has nobody to watch.

    Args:
        process_group: The ranks; the default group when None.
        timeout_s: See ``timeout_of``; the same on every rank. Only the first call for these ranks counts.

    Raises:
        HyperparameterError: As ``timeout_of``; on all ranks together.
        RanksDisagreeError: Ranks gave different times.
    """
    if num_ranks(process_group) == 1 or not _is_new(process_group):
        return
    timeout_s = _agreed_timeout(timeout_s, process_group)
    if timeout_s == 0:
        return
    board = _open_board(timeout_s, process_group)
    client = None if board is None else _client(timeout_s)  # of the main thread, as the board's is of the watch
    place = (RankProcess.own(own_rank()), client is not None)
    places = gather_objects(place, process_group)
    if board is None or client is None or not all(has_client for _, has_client in places):
        return  # a kind of store that has no second client
    watch = Watch(
        board,
        [process for process, _ in places],
        own_rank(process_group),
        timeout_s=timeout_s,
        rank_0_serves=_rank_0_serves_store(),
        world=_world(),
    )
    open_place(Board(client, board.prefix), watch, _world())
    _watches[:] = [*(one for one in _watches if one.is_on), watch]
    _install_hooks()
    watch.start()


def report_failure(text: str) -> None:
    """Tell the other ranks that this one ends for good, and why: they print it, and end within seconds.

    Uncaught exceptions are reported without this. Does nothing where no watch is on; takes some seconds at most.
    """
    for watch in _active():
        watch.report(text)


def explain(error: BaseException) -> RankLostError | None:
    """Which rank is behind a broken connection: an error to raise from ``error``; None where it is not known.

    Local. It blocks for some seconds when ``error`` comes from a connection, and returns at once otherwise.
    """
    if not _is_about_connections(error):
        return None
    for watch in _watches if _process == os.getpid() else []:
        verdict = watch.ask()
        if verdict is not None:
            return RankLostError(watch.line(verdict))
    return None


def _is_new(process_group: dist.ProcessGroup | None) -> bool:
    """Whether no watch was asked for that covers these ranks; the same answer on each of them."""
    global _asked_in
    if _asked_in is None or _asked_in() is not _world():
        _asked_in = weakref.ref(_world())
        _asked.clear()
    ranks = frozenset(dist.get_process_group_ranks(process_group))
    if any(ranks <= others for others in _asked):
        return False
    _asked.add(ranks)
    return True


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _agreed_timeout(given: float | None, process_group: dist.ProcessGroup | None) -> float:
    timeout_s = together(lambda: timeout_of(given), process_group)
    by_rank = gather_objects(timeout_s, process_group)
    for rank, other in enumerate(by_rank):
        if other != by_rank[0]:
            raise RanksDisagreeError(
                f"Ranks wait for each other for different times: {by_rank[0]:g} s on rank 0 and {other:g} s on rank "
                f"{rank}. Give the same rank_timeout_s, or the same {VARIABLE}, on every rank."
            )
    return timeout_s


def _open_board(timeout_s: float, process_group: dist.ProcessGroup | None) -> Board | None:
    """The board of a new watch, with this rank's first beat on it; None where the store cannot be opened again."""
    name = gather_objects(uuid.uuid4().hex, process_group)[0]
    try:
        client = _client(timeout_s)
        if client is None:
            return None
        board = Board(client, f"dist_optim/{name}")
        board.beat(own_rank(), "1")
        board.say_where(own_rank(), Whereabouts().to_text())
    except RuntimeError:
        return None
    return board


def _client(timeout_s: float) -> dist.Store | None:
    # Longer than the judge waits: an operation that fails sooner has lost its connection.
    return own_client(dist.distributed_c10d._get_default_store(), 3 * timeout_s)


def _rank_0_serves_store() -> bool:
    """Whether the job's store ends with rank 0: not a file, and not in torchrun's agent."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return isinstance(store, dist.TCPStore) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _active() -> list[Watch]:
    return [watch for watch in _watches if watch.is_on] if _process == os.getpid() else []


def _is_about_connections(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a process group's report of a lost peer."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower()
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "closed by peer")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _install_hooks() -> None:
    """Once a process: on uncaught exceptions, on the end of the process group, and on the end of the interpreter."""
    global _process
    if _process == os.getpid():
        return
    _process = os.getpid()
    sys.excepthook = functools.partial(_on_uncaught, sys.excepthook)
    dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = _leaving_before(
        dist.distributed_c10d.destroy_process_group
    )
    # A process that multiprocessing started runs its finalizers at its end, and not atexit's.
    atexit.register(_leave)
    multiprocessing.util.Finalize(None, _leave, exitpriority=100)


def _on_uncaught(
    previous: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, (KeyboardInterrupt, RankLostError)):
        lost = explain(error)
        if lost is None:
            report_failure(f"{kind.__name__}: {error}")
        else:
            lost.__cause__ = error.with_traceback(trace)
            kind, error, trace = RankLostError, lost, None
    for watch in _active():
        watch.main_ends()
    previous(kind, error, trace)


def _leaving_before(destroy: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(destroy)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        # The store may end with the default group.
        if group is None or group is dist.group.WORLD:
            _leave()
        destroy(group)

    return destroy_process_group


def _leave() -> None:
    for watch in _active():
        watch.leave()
