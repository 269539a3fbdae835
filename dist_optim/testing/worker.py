"""What one rank of a pool does: join the group, then run one body after another until the parent goes away."""

from __future__ import annotations

import faulthandler
import gc
import io
import os
import pickle
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_optim.generators import seed_generators
from dist_optim.ranks.gloo import use_one_worker_each
from dist_optim.testing.native import allow_tracing_by

# Held for the life of the process: faulthandler writes to the files' descriptors from inside a signal handler.
_stack_file: io.TextIOBase | None = None
_crash_file: io.TextIOBase | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a rank needs to know about its pool."""

    rank: int
    world_size: int
    backend: str
    timeout_s: float
    directory: Path  # the file store and the stack dumps live here

    @property
    def stack_path(self) -> Path:
        """Where this rank writes its Python stack when it receives SIGUSR1."""
        return self.directory / f"stack-of-rank-{self.rank}"

    @property
    def crash_path(self) -> Path:
        """Where this rank's Python stacks are once SIGSEGV or its kin ended it; empty until then."""
        return self.directory / f"crash-of-rank-{self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How a body ended on one rank: with a value, or with a formatted traceback."""

    value: Any = None
    traceback: str | None = None


def pack(value: object) -> bytes:
    """Serialize to plain bytes: tensors travel by value, and tensors that share storage still share it on arrival."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """Invert ``pack``; tensors arrive on the CPU. The bytes come from our own parent or child, so they are trusted."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def worker_main(config: WorkerConfig, connection: Connection) -> None:
    """Run bodies sent through ``connection`` until it closes."""
    _prepare_process(config)
    try:
        _join_process_group(config)
    except BaseException as error:
        connection.send_bytes(pack(Reply(traceback=_format(error))))
        return
    connection.send_bytes(pack(Reply()))
    num_frozen = 0
    while (job := _next_job(connection)) is not None:
        connection.send_bytes(_run_job(job))
        if len(sys.modules) > num_frozen:
            gc.collect()
            gc.freeze()  # what was imported: engines collect garbage at every start, and would walk it each time
            num_frozen = len(sys.modules)
    dist.destroy_process_group()


def _prepare_process(config: WorkerConfig) -> None:
    global _stack_file, _crash_file
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches every process; the parent alone decides
    _stack_file = config.stack_path.open("w")
    faulthandler.register(signal.SIGUSR1, file=_stack_file, all_threads=False)
    _crash_file = config.crash_path.open("w")
    faulthandler.enable(file=_crash_file, all_threads=True)
    if (parent := parent_process()) is not None and parent.pid is not None:
        allow_tracing_by(parent.pid)
    torch.set_num_threads(1)
    # What a launcher would set: engines read their place from the environment even when a process group exists.
    os.environ.update(
        RANK=str(config.rank),
        LOCAL_RANK=str(config.rank),
        WORLD_SIZE=str(config.world_size),
        LOCAL_WORLD_SIZE=str(config.world_size),
        OMP_NUM_THREADS="1",
    )
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, whatever the host name resolves to


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _join_process_group(config: WorkerConfig) -> None:
    use_one_worker_each()
    device = None
    if config.backend == "nccl":
        device = torch.device("cuda", config.rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        config.backend,
        store=dist.FileStore(str(config.directory / "store"), config.world_size),
        rank=config.rank,
        world_size=config.world_size,
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device,
    )


def _next_job(connection: Connection) -> bytes | None:
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


def _run_job(job: bytes) -> bytes:
    """Run one body and return its packed reply; whatever it raises is part of the reply."""
    try:
        sys_path, call = pickle.loads(job)
        sys.path.extend(entry for entry in sys_path if entry not in sys.path)
        body, args, kwargs = unpack(call)
        seed_generators(0)
        return pack(Reply(value=body(*args, **kwargs)))
    except BaseException as error:  # SystemExit and a test framework's outcomes must reach the report too
        return pack(Reply(traceback=_format(error)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _format(error: BaseException) -> str:
    own_frame = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, own_frame.tb_next if own_frame else None))
