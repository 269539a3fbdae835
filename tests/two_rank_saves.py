"""Saves of two ranks of which one is killed: the other ends and names it, and two new ones resume.

Each rank is forked from a process that has no process group, so that a job costs no imports.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from door_runs import Run, equal
from fresh import forget
from patience import PATIENCE_S

from dist_optim.ranks.liveness import VARIABLE
from dist_optim.testing import faults

TIMEOUT_S = 20
"""The user's: a rank that is not heard from for so long ends the job."""


@dataclass(frozen=True)
class Ended:
    """How two ranks have ended."""

    codes: tuple[int, int]
    outputs: tuple[str, str]
    ids: tuple[int, int]


def two(folder: Path, body: Callable[..., None], *args: Any) -> Ended:
    """Run it on two ranks, and wait until both have ended; who does not is killed, and has -9 as well."""
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    ids = [_forked(folder, name, rank, body, args) for rank in (0, 1)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(codes) < 2 and time.monotonic() < deadline:
        for child in set(ids) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in set(ids) - codes.keys():
        with suppress(ProcessLookupError):
            os.kill(child, 9)
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outputs = [(folder / f"{name}-{rank}").read_text() for rank in (0, 1)]
    return Ended((codes[ids[0]], codes[ids[1]]), (outputs[0], outputs[1]), (ids[0], ids[1]))


def _forked(folder: Path, name: str, rank: int, body: Callable[..., None], args: tuple[Any, ...]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {VARIABLE: str(TIMEOUT_S), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        torch.set_num_threads(1)
        forget()  # what the process held that it was forked from
        store = dist.FileStore(str(folder / f"{name}-store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        body(*args)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def saves(kind: type[Run], home: Path, lost: int, number: int | None) -> None:
    """After two steps, and again after a third: there, one rank is killed at a call."""
    run = kind(home, 2)
    run.save()
    _write(home.with_name("before"), run)
    run = kind(home, 3)
    _write(home.with_name("after"), run)
    dist.barrier()
    act = number if dist.get_rank() == lost else None
    with faults.faults_below(home, act, faults.kill) as calls:
        run.save()
    home.with_name(f"calls-{dist.get_rank()}").write_text(str(calls.count))


def resumes(kind: type[Run], home: Path) -> None:
    run = kind(home, 0)
    run.load(None)
    _write(home.with_name("resumed"), run)


def _write(path: Path, run: Run) -> None:
    bits = run.bits()
    if dist.get_rank() == 0:
        path.write_bytes(pickle.dumps(bits))


def calls_of(kind: type[Run], folder: Path) -> list[int]:
    """How many calls the save of each rank makes."""
    with mock.patch.dict(os.environ):
        ended = two(folder, saves, kind, folder / "home", 0, None)
    assert ended.codes == (0, 0), ended.outputs
    return [int((folder / f"calls-{rank}").read_text()) for rank in (0, 1)]


def problem_of(kind: type[Run], folder: Path, lost: int, number: int) -> str:
    """What is wrong with how a job ends that loses a rank in a save, and with what is resumed; empty for nothing."""
    with mock.patch.dict(os.environ):
        ended = two(folder, saves, kind, folder / "home", lost, number)
        if ended.codes[lost] != -9:
            return f"the rank that was to be killed ended with {ended.codes[lost]}: {ended.outputs[lost]}"
        name = f"rank {lost} (host {socket.gethostname()}, pid {ended.ids[lost]})"
        if ended.codes[1 - lost] != 1 or name not in ended.outputs[1 - lost]:
            return f"the other rank ended with {ended.codes[1 - lost]}, and said {ended.outputs[1 - lost][-2000:]}"
        resumed = two(folder, resumes, kind, folder / "home")
    if resumed.codes != (0, 0):
        return f"does not resume: {resumed.outputs}"
    found, *expected = (pickle.loads((folder / name).read_bytes()) for name in ("resumed", "before", "after"))
    return "" if any(equal(found, one) for one in expected) else "resumed as something else"
