"""One rank fails in backward while the others wait for it in the engine: the one failure that no agreement can tell.

The rank raises its own error and leaves; ``dist_optim.ranks.liveness`` ends the others, and names it. So each cell runs
in processes of its own, which all end: what they print is what a user reads.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from patience import PATIENCE_S
from sessions import Engine, Session
from situations import DEFECT, REFUSED, Outcome, without_paths
from torch import Tensor

HAS_WATCH = importlib.util.find_spec("dist_optim.ranks.liveness") is not None
TITLE = "one rank fails in backward"
WATCH_S = "60"
"""The watch's own patience: much longer than it takes, as the failing rank tells the others itself."""
"""For all processes to end; the engine's own timeout is longer."""


def outcomes(engines: Sequence[Engine]) -> dict[str, Outcome]:
    """By engine. All jobs run at once: most of their time is imports."""
    with tempfile.TemporaryDirectory() as directory:
        jobs = [(engine, _start(engine, Path(directory) / engine.title)) for engine in engines]
        deadline = time.monotonic() + PATIENCE_S
        return {engine.title: _end(ranks, Path(directory) / engine.title, deadline) for engine, ranks in jobs}


def _start(engine: Engine, directory: Path) -> list[BaseProcess]:
    directory.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch.nn.parallel"])
    ranks = [context.Process(target=_run_rank, args=(engine, directory, rank)) for rank in range(engine.num_ranks)]
    for rank in ranks:
        rank.start()
    return list(ranks)


def _end(ranks: list[BaseProcess], directory: Path, deadline: float) -> Outcome:
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    said = [(directory / f"rank{rank}").read_text() for rank in range(len(ranks))]
    if not all(codes):  # None: it still waited; 0: it ended as if all were well
        return Outcome(DEFECT, f"ranks ended with {codes}")
    if "RuntimeError: bad luck" not in said[-1]:
        return Outcome(DEFECT, f"the failing rank said: {said[-1][-500:]}")
    texts = [re.search(r"RankLostError: (.*)", text) for text in said[:-1]]
    found = [re.sub(r"\(host [^)]*\)", "(host H, pid P)", text[1]) for text in texts if text]
    if len(found) < len(texts) or not all(f"ank {len(ranks) - 1} (host" in text for text in found):
        return Outcome(DEFECT, f"the others said: {[text[-500:] for text in said[:-1]]}")
    return Outcome(REFUSED, f"RankLostError: {without_paths(found[0])}")


def _run_rank(engine: Engine, directory: Path, rank: int) -> None:
    """What an interpreter does with a script: an uncaught exception goes to the hook, and ends it with 1."""
    output = os.open(directory / f"rank{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": engine.num_ranks, "LOCAL_WORLD_SIZE": engine.num_ranks}
    os.environ.update({key: str(value) for key, value in place.items()}, DIST_OPTIM_RANK_TIMEOUT_S=WATCH_S)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), engine.num_ranks)
    timeout = timedelta(seconds=4 * PATIENCE_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=engine.num_ranks, timeout=timeout)
    try:
        _train(engine, fails=rank == engine.num_ranks - 1)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _train(engine: Engine, fails: bool) -> None:
    session = engine.session("adamw_torch")
    session.train(range(2))
    if fails:
        fail_from_now_on(session)
    session.train([2, 3])


def fail_from_now_on(session: Session) -> None:
    """Backward passes raise, in the middle."""
    loss_of = session.loss

    def loss(step: int) -> Tensor:
        result = loss_of(step)
        result.register_hook(_fail)
        return result

    session.loss = loss  # type: ignore[method-assign]


def _fail(_: Tensor) -> None:
    raise RuntimeError("bad luck")
