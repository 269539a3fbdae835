"""A pool of ranks that starts once, in seconds, and then runs bodies in milliseconds.

Lifetime: the first ``run`` starts the ranks. They stay until ``close``, until the parent ends however it ends, or until
a body fails, dies or runs out of time. A group that one rank left in the middle of a collective cannot be trusted, so
the pool then stops all of its ranks, and the next ``run`` starts fresh ones.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from dist_optim.testing.failure import RankFailure, is_crash
from dist_optim.testing.native import native_stacks
from dist_optim.testing.worker import Reply, WorkerConfig, pack, unpack, worker_main

Result = TypeVar("Result")

START_TIMEOUT_S = 120.0  # importing torch on a busy machine is the slow part
OTHERS_MAY_REPORT_S = 1.0  # once a rank failed: most often the others fail too, and their view belongs in the report
JOIN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Worker:
    config: WorkerConfig
    process: ForkServerProcess
    connection: Connection

    def crash(self) -> str:
        """The Python stacks that the rank wrote when a signal ended it; empty when none did."""
        try:
            return self.config.crash_path.read_text(errors="replace")
        except OSError:
            return ""

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(JOIN_TIMEOUT_S)


class RankPool:
    """Persistent ranks on this machine that run a function together.

    Example:
        >>> with RankPool(world_size=2) as pool:                     # doctest: +SKIP
        ...     ranks = pool.run(torch.distributed.get_rank)         # [0, 1]

    Args:
        world_size: Number of ranks, one process each.
        backend: ``"gloo"``, or ``"nccl"`` with one GPU per rank (rank ``r`` gets ``cuda:r`` as its current device).
        timeout_s: The longest a body may take, and the process group's own timeout.

    Raises:
        ValueError: The world size is below 1, or the backend needs more GPUs than there are.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", timeout_s: float = 60.0) -> None:
        if world_size < 1:
            raise ValueError(f"RankPool needs at least one rank, got world_size={world_size}.")
        if backend == "nccl" and torch.cuda.device_count() < world_size:
            raise ValueError(
                f"RankPool with backend='nccl' needs one GPU per rank: world_size={world_size}, but there are "
                f"{torch.cuda.device_count()} GPUs. Use fewer ranks or backend='gloo'."
            )
        self.world_size = world_size
        self.backend = backend
        self.timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._directory: Path | None = None

    @property
    def process_ids(self) -> list[int]:
        """The ranks' process ids in rank order; empty while the pool is not started."""
        return [worker.process.pid or 0 for worker in self._workers]

    @property
    def dead_ranks(self) -> dict[int, int | None]:
        """rank -> exit code of each started rank whose process has ended although nobody closed the pool."""
        return {
            worker.config.rank: worker.process.exitcode for worker in self._workers if not worker.process.is_alive()
        }

    @property
    def crashes(self) -> dict[int, str]:
        """rank -> the Python stacks of each started rank that SIGSEGV or its kin has ended."""
        return {worker.config.rank: text for worker in self._workers if (text := worker.crash())}

    def run(
        self, body: Callable[..., Result], *args: Any, timeout_s: float | None = None, **kwargs: Any
    ) -> list[Result]:
        """Run ``body(*args, **kwargs)`` on every rank and return one result per rank, in rank order.

        On each rank the process group is initialised, ``RANK`` and its kin are set, torch uses one thread, and the
        global random generators are seeded with 0 at the start of each body. Other process-wide state stays as the
        previous body left it.

        Args:
            body: A function at the top of an importable module: it is pickled by reference.
            *args: Picklable; tensors arrive as copies on the CPU.
            timeout_s: The longest this call may take, when shorter than the pool's own timeout.
            **kwargs: As ``args``.

        Returns:
            What each rank returned; tensors arrive as copies on the CPU.

        Raises:
            RankFailure: A rank raised, died, or had not returned in time. All ranks are stopped.
        """
        __tracebackhide__ = True
        job = pickle.dumps((sys.path, pack((body, args, kwargs))))
        name = getattr(body, "__qualname__", repr(body))
        self._start()
        try:
            self._send(job, name)
            return [reply.value for reply in self._collect(name, self.timeout_s if timeout_s is None else timeout_s)]
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """End the ranks and remove what they left on disk. A later ``run`` starts fresh ones."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self._stop()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Start the ranks unless they run, and wait until all have joined the process group."""
        __tracebackhide__ = True
        if self._workers:
            return
        # The fork server imports torch and us once; a rank is then a fork of a process without threads or CUDA context.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", worker_main.__module__])
        self._directory = Path(tempfile.mkdtemp(prefix="rank-pool-"))
        try:
            self._workers = [self._start_worker(context, rank, self._directory) for rank in range(self.world_size)]
            self._collect("joining the process group", START_TIMEOUT_S)
        except BaseException:
            self._stop()
            raise

    def _start_worker(self, context: Any, rank: int, directory: Path) -> _Worker:
        config = WorkerConfig(
            rank=rank,
            world_size=self.world_size,
            backend=self.backend,
            timeout_s=self.timeout_s,
            directory=directory,
        )
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(config, theirs), name=f"rank-{rank}", daemon=True)
        process.start()
        theirs.close()  # the rank holds the only other end, so its death closes the connection
        return _Worker(config, process, ours)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _send(self, job: bytes, name: str) -> None:
        __tracebackhide__ = True
        dead = self.dead_ranks
        if dead:
            raise RankFailure(
                f"{name} cannot run on {self.world_size} rank(s), after the previous body had returned",
                exit_codes=dead,
                crashes=self.crashes,
            )
        for worker in self._workers:
            with suppress(OSError):  # a rank that dies just now is named by the collection that follows
                worker.connection.send_bytes(job)

    def _collect(self, name: str, timeout_s: float) -> list[Reply]:
        """Return every rank's reply in rank order, or raise one report about all ranks."""
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout_s
        replies: dict[int, Reply] = {}
        died: dict[int, int | None] = {}
        timed_out = False
        while pending := [w for w in self._workers if w.config.rank not in replies and w.config.rank not in died]:
            ready = wait(
                [w.connection for w in pending] + [w.process.sentinel for w in pending],
                timeout=max(0.0, deadline - time.monotonic()),
            )
            if not ready:
                timed_out = not (died or _failures(replies))
                break
            for worker in pending:
                if worker.connection in ready or worker.process.sentinel in ready:
                    _receive(worker, replies, died)
            if died or _failures(replies):
                deadline = min(deadline, time.monotonic() + OTHERS_MAY_REPORT_S)
        failures = _failures(replies)
        if not (pending or died or failures):
            return [replies[rank] for rank in range(self.world_size)]
        reason = f"did not end within {timeout_s:g} s" if timed_out else "failed"
        raise RankFailure(
            f"{name} {reason} on {self.world_size} rank(s)",
            tracebacks=failures,
            exit_codes=died,
            crashes=self.crashes,
            still_running={worker.config.rank: _stack_of(worker) for worker in pending},
            native_stacks=self._native_stacks(died, [worker.config.rank for worker in pending], timed_out),
        )

    def _native_stacks(self, died: dict[int, int | None], pending: list[int], timed_out: bool) -> dict[int, str]:
        """After a crash of all ranks, after a time-out of those waited for; else of none, for it takes seconds."""
        process_ids = dict(enumerate(self.process_ids))
        crashed = [rank for rank, code in died.items() if is_crash(code)]
        living = [rank for rank in process_ids if rank not in died] if crashed else pending if timed_out else []
        return native_stacks(*({rank: process_ids[rank] for rank in ranks} for ranks in (living, crashed)))


def _receive(worker: _Worker, replies: dict[int, Reply], died: dict[int, int | None]) -> None:
    """Store the worker's reply, or its exit code when it ended without one."""
    rank = worker.config.rank
    try:
        if not worker.connection.poll():
            raise EOFError
        replies[rank] = unpack(worker.connection.recv_bytes())
    except (EOFError, OSError):
        worker.process.join(JOIN_TIMEOUT_S)
        died[rank] = worker.process.exitcode


def _failures(replies: dict[int, Reply]) -> dict[int, str]:
    return {rank: reply.traceback for rank, reply in replies.items() if reply.traceback is not None}


def _stack_of(worker: _Worker, patience_s: float = 5.0) -> str:
    """Ask a rank that has not ended for its Python stack; the handler answers even from inside a collective."""
    deadline = time.monotonic() + patience_s
    lines: list[str] = []
    with suppress(OSError):
        os.kill(worker.process.pid or 0, signal.SIGUSR1)
        while not lines and time.monotonic() < deadline:
            time.sleep(0.05)
            lines = worker.config.stack_path.read_text().splitlines()
    in_the_body = itertools.takewhile(lambda line: worker_main.__code__.co_filename not in line, lines)
    return "\n".join(in_the_body) or "(its stack is not known)"
