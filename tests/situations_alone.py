"""More rows of docs/situations.md: torch's own doors to the state, and calls that one rank makes alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import situations
import torch.distributed as dist
from sessions import ENGINES, Engine, Session, TorchSession
from situations import ALONE, REFUSED, RIGHT, Defect, Outcome, Situation, without_paths, zero
from situations_loops import resumed_through_torch
from torch.distributed.checkpoint import state_dict as torch_doors

from dist_optim.errors import RanksDisagreeError
from dist_optim.ranks import meeting, whereabouts
from dist_optim.ranks.agreement import gather_objects

NAMES = ("adamw_torch", "galore_adamw")


def read_by_torch(engine: Engine, name: str, folder: Path) -> Outcome:
    """Read six times, and trained on: each reading was a step once."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    for step in range(6):
        alone.train([step])
        session.train([step])
        torch_doors.get_optimizer_state_dict(session.model, session.optimizers[0])
    situations.compare("read after each step", session, alone)
    return Outcome(RIGHT)


def alone_at(engine: Engine, name: str, folder: Path, *, call: Callable[[Session, Path], object]) -> Outcome:
    """Rank 0 makes the call, while the others go on to the next backward pass; then all go on together."""
    session, alone = engine.session(name), engine.alone(name)
    session.train(range(2))
    alone.train(range(3))
    return refused_alone(session, alone, folder, call)


def refused_alone(session: Any, alone: TorchSession, folder: Path, call: Callable[[Any, Path], object]) -> Outcome:
    """After two steps of the session; one process has taken a third."""
    text = ""
    with mock.patch.object(meeting, "PATIENCE_S", 0.3), mock.patch.object(whereabouts, "IDLE_S", 0.6):
        if dist.get_rank() == 0:
            try:
                call(session, folder)
            except RanksDisagreeError as error:
                text = str(error)
        session.train(range(2, 3))
    situations.compare("gone on", session, alone)
    text = gather_objects(text)[0]
    if "Call it on every rank" not in text or folder.exists():
        raise Defect(f"the call was not refused, or left something behind: {text}")
    return Outcome(REFUSED, f"RanksDisagreeError: {_without_the_others(text)}")


def _without_the_others(text: str) -> str:
    """How many there are, and where exactly they wait, is the engine's matter."""
    return re.sub(r"rank R( waits in).*?\. Call", r"rank R\1 ... Call", without_paths(text))


def save(session: Session, folder: Path) -> None:
    session.save(folder)


def save_in_except(session: Session, folder: Path) -> None:
    try:
        raise ValueError("bad luck with a batch")
    except ValueError:
        session.save(folder)


def evaluate(session: Session, folder: Path) -> None:
    assert isinstance(session, TorchSession)
    session.optimizers[0].eval()


def read_state(session: Session, folder: Path) -> None:
    assert isinstance(session, TorchSession)
    session.optimizers[0].state_dict()


def read_for_torch(session: Session, folder: Path) -> None:
    assert isinstance(session, TorchSession)
    torch_doors.get_optimizer_state_dict(session.model, session.optimizers[0])


ENGINE_HOLDS = zero("DeepSpeed's engine holds the optimizer, and saves it")
SWAPPING = ("schedule_free_adamw",)
ROWS = (
    Situation("state read by torch's own functions", read_by_torch, (*NAMES, *SWAPPING), ENGINE_HOLDS),
    Situation("resumed through torch's own functions", resumed_through_torch, (*NAMES, *SWAPPING), ENGINE_HOLDS),
    Situation("saved by one rank", partial(alone_at, call=save), NAMES, ALONE),
    Situation("saved in one rank's except", partial(alone_at, call=save_in_except), NAMES, ALONE),
    Situation("evaluated by one rank", partial(alone_at, call=evaluate), SWAPPING, {**ALONE, **ENGINE_HOLDS}),
    Situation("state read by one rank", partial(alone_at, call=read_for_torch), NAMES, {**ALONE, **ENGINE_HOLDS}),
    Situation(
        "state_dict() by one rank",
        partial(alone_at, call=read_state),
        not_for={
            **ALONE,
            **ENGINE_HOLDS,
            **{
                one.title: "a rank's own part, as in torch"
                for one in ENGINES
                if one.title in ("FSDP1", "FSDP2", "HSDP")
            },
        },
    ),
)
"""In the order of the table."""
