"""What scripts with a stock optimizer do where ours refuses: the loops of ``stock_situations``.

A body runs on every rank as a user's script would: nothing is caught, and nothing is exchanged but by stock.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import failing_backward
import situations_loops
import situations_models
import torch
import torch.distributed as dist
from sessions import Net, Session, TorchSession, batch
from situations import HasWeights, is_last, out_of_reach, scaled_step, spoil
from stock_sessions import ONE_PROCESS, StockEngine, StockTorchSession, StockZeroSession
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint import state_dict as torch_doors
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import PostLocalSGDOptimizer

from dist_optim.testing import relative_distance


@dataclass(frozen=True)
class Ended:
    """What one rank ends with."""

    distance: float
    """Of its weights from those of one process, by the way that these went; 0 where every bit is equal."""
    digest: str
    """Of its weights."""


FOUND: list[Ended] = []
"""In the cell that is measured, on this rank."""


def note(what: str, session: HasWeights, reference: HasWeights) -> None:
    """In the place of ``situations.compare``: measured on this rank, and no rank hears of another's."""
    actual, expected = session.weights(), reference.weights()
    start = dict(getattr(reference, "make", Net)().named_parameters())
    names = sorted(expected)
    like = {name: one.detach().to(actual[name].dtype) for name, one in expected.items()}  # an engine shows it rounded
    ours, theirs, begin = ([side[name].detach().double() for name in names] for side in (actual, like, start))
    is_equal = all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    distance = 0.0 if is_equal else relative_distance(ours, theirs, begin)
    digest = hashlib.sha256(b"".join(one.numpy().tobytes() for one in ours)).hexdigest()
    FOUND.append(Ended(distance, digest))


# The rows in which ours refuses ---------------------------------------------------------------------------------------


def both(engine: StockEngine, name: str, **options: Any) -> tuple[Session, TorchSession]:
    """The session and one process, after two steps."""
    session, alone = engine.session(name, **options), engine.alone(name, **options)
    for one in (session, alone):
        one.train(range(2))
    return session, alone


def average(alone: TorchSession, step: int, num_ranks: int, num_batches: int | None = None) -> None:
    """One process's step by the mean over the ranks' batches."""
    gradients = []
    for rank in range(num_ranks if num_batches is None else num_batches):
        with mock.patch.object(alone, "arguments", lambda step, rank=rank: (*batch(step, rank), True)):
            alone.backward(step)
        gradients.append([parameter.grad for parameter in alone.model.parameters()])
        for parameter in alone.model.parameters():
            parameter.grad = None
    for parameter, *parts in zip(alone.model.parameters(), *gradients, strict=True):
        present = [part / num_ranks for part in parts if part is not None]
        parameter.grad = sum(present[1:], present[0]) if present else None
    alone.step()


def rate_differs(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    for group in session.groups():
        group["lr"] *= 2.0 if is_last() else 1.0
    for one in (session, alone):
        one.train(range(2, 4))
    note("trained on", session, alone)


def gradient_missing(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    session.backward(2)
    for fqn, parameter in session.module().named_parameters():
        if is_last() and "head" in fqn:
            parameter.grad = None
    session.step()
    alone.train([2])
    for one in (session, alone):
        one.train([3])
    note("trained on", session, alone)


def step_fails(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    error = torch.OutOfMemoryError("out of memory. Tried to allocate 20 MiB")
    optimizer: Any = session.held.basic_optimizer if isinstance(session, StockZeroSession) else optimizer_of(session)
    session.backward(2)
    if is_last():
        optimizer.step = mock.Mock(side_effect=error)
    session.step()
    session.train([3])
    alone.train([2, 3])
    note("trained on", session, alone)


def optimizer_of(session: Session) -> torch.optim.Optimizer:
    assert isinstance(session, StockTorchSession)
    return session.stock[0]


def upstream_fails_on_nan(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    session.backward(2)
    spoil(session)
    session.step()
    for one in (session, alone):
        one.train([3])
    note("trained on", session, alone)


def nonfinite(engine: StockEngine, name: str, folder: Path) -> None:
    """An infinite gradient on the last rank; DeepSpeed keeps the gradients, so there the loss is infinite."""
    session, alone = both(engine, name)
    if isinstance(session, StockZeroSession):
        session.held.backward(session.loss(2) * (math.inf if is_last() else 1.0))
    else:
        session.backward(2)
        spoil(session, math.inf)
    session.step()
    for one in (session, alone):
        one.train([3])
    note("trained on", session, alone)


def scaled(engine: StockEngine, name: str, folder: Path, is_sharded: bool = False) -> None:
    session, alone = engine.session(name), engine.alone(name)
    optimizer = optimizer_of(session)
    scaler: Any = ShardedGradScaler("cpu", 8.0) if is_sharded else torch.amp.GradScaler("cpu", 8.0)
    for number in range(5):
        scaled_step(engine, session, optimizer, scaler, number)
    alone.train([0, 1, 3, 4])
    note("after an overflow", session, alone)


def joined(engine: StockEngine, name: str, folder: Path) -> None:
    """The last rank runs out of batches a step before the others."""
    session, alone = engine.session(name, differs=True), engine.alone(name)
    assert isinstance(session, TorchSession)
    with Join([session.model]):  # type: ignore[list-item]
        session.train(range(2 if is_last() else 3))
    for step in range(2):
        average(alone, step, engine.num_ranks)
    average(alone, 2, engine.num_ranks, engine.num_ranks - 1)
    note("after Join", session, alone)


def unfrozen_later(engine: StockEngine, name: str, folder: Path, is_listed: bool = True) -> None:
    session = engine.session(name, frozen="first", unused=True, is_listed=is_listed)
    alone = engine.alone(name, frozen="first", is_listed=True)
    for one in (session, alone):
        one.train(range(2))
        one.freeze("first", False)
        one.train(range(2, 4))
    note("after it was unfrozen", session, alone)


def wrapped_frozen(engine: StockEngine, name: str, folder: Path) -> None:
    session = engine.session(name, frozen="first", is_listed=True, is_wrapped_frozen=True, differs=True, unused=True)
    alone = engine.alone(name, frozen="first", is_listed=True)
    session.train(range(2))
    session.freeze("first", False)
    session.train(range(2, 4))
    for step in range(4):
        if step == 2:
            alone.freeze("first", False)
        average(alone, step, engine.num_ranks)
    note("after it was unfrozen", session, alone)


def save_fails(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    session.save(out_of_reach(folder, on_rank=0))
    for one in (session, alone):
        one.train([2])
    note("after the save", session, alone)


def load_fails(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    session.save(folder)
    session.train([2])
    session.load(out_of_reach(folder, on_rank=dist.get_world_size() - 1))
    for one in (session, alone):
        one.train(range(2, 4))
    note("after the load", session, alone)


def resumed_without_the_wrapper(engine: StockEngine, name: str, folder: Path) -> None:
    session = engine.session(name, differs=True)
    alone = engine.alone(name)
    session.train(range(2))
    session.save(folder)
    resumed = StockTorchSession(ONE_PROCESS, name, differs=True)
    resumed.load(folder)
    resumed.train(range(2, 4))
    for step in range(4):
        average(alone, step, engine.num_ranks)
    note("resumed", resumed, alone)


def unreduced_later(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = engine.session(name, differs=True), engine.alone(name)
    session.train(range(3))
    with session.without_reduction():
        session.backward(3)
    session.step()
    for step in range(4):
        average(alone, step, engine.num_ranks)
    note("after a step without reduction", session, alone)


def gradients_differ(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    session.backward(2)
    for parameter in session.module().parameters():
        if is_last() and parameter.grad is not None:
            parameter.grad.mul_(0.5)
    session.step()
    alone.train([2])
    for one in (session, alone):
        one.train([3])
    note("trained on", session, alone)


def sparse(engine: StockEngine, name: str, folder: Path) -> None:
    session = engine.session(name, make=situations_models.sparse_model)
    alone = engine.alone(name, make=situations_models.sparse_model)
    for one in (session, alone):
        one.train(range(3))
    note("trained", session, alone)


def gradient_of_another_type(engine: StockEngine, name: str, folder: Path) -> None:
    make = situations_models.by_another_type
    session, alone = both(engine, name, make=make)
    session.backward(2)
    situations_models.round_gradients(session)
    session.step()
    for one in (session, alone):
        one.train([3])
    note("trained on", session, alone)


def argument_differs(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        for group in one.groups():
            group["weight_decay"] = 0.2 if is_last() and one is session else 0.1
        one.train(range(4))
    note("trained", session, alone)


def deep_copied(engine: StockEngine, name: str, folder: Path) -> None:
    """As a script has it that keeps a copy."""
    session, alone = both(engine, name)
    copy.deepcopy(optimizer_of(session))
    for one in (session, alone):
        one.train(range(2, 4))
    note("gone on", session, alone)


def alone_at(engine: StockEngine, name: str, folder: Path, *, call: Callable[[Session, Path], object]) -> None:
    """Rank 0 makes the call, while the others go on to the next backward pass."""
    session, alone = both(engine, name)
    if dist.get_rank() == 0:
        call(session, folder)
    for one in (session, alone):
        one.train(range(2, 4))
    note("gone on", session, alone)


def write(session: Session, folder: Path) -> None:
    session.write(folder) if isinstance(session, StockTorchSession) else session.save(folder)


def write_in_except(session: Session, folder: Path) -> None:
    try:
        raise ValueError("bad luck with a batch")
    except ValueError:
        write(session, folder)


def evaluate(session: Session, folder: Path) -> None:
    optimizer: Any = optimizer_of(session)
    optimizer.eval()
    optimizer.train()


def read_for_torch(session: Session, folder: Path) -> None:
    torch_doors.get_optimizer_state_dict(session.module(), optimizer_of(session))


def read_state(session: Session, folder: Path) -> None:
    optimizer_of(session).state_dict()


def local_steps_averaged(engine: StockEngine, name: str, folder: Path) -> None:
    """Reduced gradients in two steps, none in three, with averaged weights after each second of these."""
    session, ranks = engine.session(name, differs=True), [engine.alone(name) for _ in range(engine.num_ranks)]
    assert isinstance(session, StockTorchSession)
    situations_loops.local_steps(session, 2)
    averager = PeriodicModelAverager(period=2, warmup_steps=2)
    session.stock[:] = [PostLocalSGDOptimizer(session.stock[0], averager)]
    session.train(range(5))
    for step in range(5):
        for rank, alone in enumerate(ranks):
            average(alone, step, engine.num_ranks) if step < 2 else train_as(alone, rank, step)
        if step in (2, 4):
            for parts in zip(*(alone.model.parameters() for alone in ranks), strict=True):
                mean = sum((part.detach() / len(parts) for part in parts[1:]), parts[0].detach() / len(parts))
                for part in parts:
                    part.data.copy_(mean)
    note("after local steps", session, ranks[0])


def train_as(alone: TorchSession, rank: int, step: int) -> None:
    with mock.patch.object(alone, "arguments", lambda step: (*batch(step, rank), True)):
        alone.train([step])


def clipped_by_one(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    for one in (session, alone):
        one.backward(2)
        if one is alone or dist.get_rank() == 0:
            clip(one)
        one.step()
        one.train([3])
    note("gone on", session, alone)


def clip(session: Session) -> None:
    model = session.module()
    if isinstance(model, FullyShardedDataParallel):
        model.clip_grad_norm_(0.01)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def backward_fails(engine: StockEngine, name: str, folder: Path) -> None:
    session, alone = both(engine, name)
    if is_last():
        failing_backward.fail_from_now_on(session)
    for one in (session, alone):
        one.train(range(2, 4))
    note("trained on", session, alone)
