"""What happens to a run besides training, under each engine: the rows of docs/situations.md.

A body runs on every rank, and returns the same outcome on all of them: *right* (to the bit what one process gets that
does the same, or was never interrupted) or *refused* (a ``DistOptimError`` on all ranks, in that call, after which
nothing was changed or the way back that it names was gone and found to be right). Everything else is a defect.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.distributed as dist
from sessions import ENGINES, ONE_PROCESS, Engine, Session, TorchSession
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import (
    CheckpointError,
    DistOptimError,
    NonFiniteGradientError,
    ParameterError,
    RanksDisagreeError,
    StateDictError,
    StepFailedError,
    UnsupportedError,
)
from dist_optim.layouts.detect import local_of
from dist_optim.ranks.agreement import gather_objects

RIGHT, REFUSED, NOT_APPLICABLE, DEFECT = "right", "refused", "does not apply", "defect"


@dataclass(frozen=True)
class Outcome:
    """What a cell of the table says."""

    kind: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


class Defect(Exception):
    """A third outcome. Raised on all ranks together, since what is compared was gathered before."""


Body = Callable[[Engine, str, Path], Outcome]


@dataclass(frozen=True)
class Situation:
    """One row of the table."""

    title: str
    body: Body
    optimizers: tuple[str, ...] = ("adamw_torch", "galore_adamw")
    not_for: Mapping[str, str] = field(default_factory=dict)
    """By the engine's title, why there is nothing to try."""


# What a body is made of ---------------------------------------------------------------------------------------------


class HasWeights(Protocol):
    """A side of a comparison."""

    def weights(self) -> dict[str, Tensor]:
        """Whole, by name. Collective."""


def compare(what: str, session: HasWeights, reference: HasWeights) -> None:
    """Every bit of every weight, against one process."""
    actual, expected = session.weights(), reference.weights()
    differing = [
        f"{name} by {(tensor - expected[name].to(tensor.dtype)).abs().max():.1e}"
        for name, tensor in actual.items()
        if not torch.equal(tensor, expected[name].to(tensor.dtype))
    ]
    everyones = [found for found in gather_objects(differing) if found]
    if everyones:
        raise Defect(f"{what}, weights differ from those of one process: {', '.join(everyones[0])}")


def refusal(expected: type[DistOptimError], call: Callable[[], Any]) -> Outcome:
    """The error that ``call`` ends with on every rank; anything else is a defect."""
    error: DistOptimError | None = None
    try:
        call()
    except DistOptimError as caught:
        error = caught
    kinds = gather_objects(type(error).__name__)
    if set(kinds) != {expected.__name__}:
        raise Defect(f"{expected.__name__} was expected on all ranks, and they ended with: {', '.join(kinds)}")
    text = re.sub(r"^\[from rank \d+\] ", "", str(error))
    if ". " not in text:
        raise Defect(f"the error does not say what to do: {text}")
    return Outcome(REFUSED, f"{expected.__name__}: {without_paths(gather_objects(text)[0])}")


def without_paths(text: str) -> str:
    """The same for every folder and rank, for every machine's last bits, and torch's line numbers."""
    text = re.sub(r"(?<=\(fingerprint\) is )-?\d+( on rank \d+ and )-?\d+", r"X\1Y", text)
    text = re.sub(r"\b(R|r)ank \d+", r"\1ank R", re.sub(r"'global_step\d+'", "'TAG'", text))
    text = re.sub(r"\[enforce fail at .*?unexpected pos \d+ vs \d+", "...", text)
    return re.sub(r"'[^' ]*/([^'/]*)'", r"'FOLDER/\1'", text)


def unchanged(session: Session, before: Mapping[str, Tensor]) -> None:
    after = session.weights()
    if any(gather_objects([name for name in before if not torch.equal(before[name], after[name])])):
        raise Defect("the refused step has changed weights")


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def out_of_reach(folder: Path, on_rank: int) -> Path:
    """The folder; on that rank one inside a file, where nothing can be written or read: its disk is not the others'."""
    if dist.get_rank() != on_rank:
        return folder
    file = folder.with_name("file")
    file.touch()
    return file / folder.name


@contextmanager
def damaged(file: Path) -> Iterator[None]:
    """It ends in the middle, for as long as the block takes."""
    content = file.read_bytes()
    gather_objects(None)
    if dist.get_rank() == 0:
        file.write_bytes(content[: len(content) // 2])
    gather_objects(None)
    yield
    if dist.get_rank() == 0:
        file.write_bytes(content)
    gather_objects(None)


# The rows -----------------------------------------------------------------------------------------------------------


def trained(engine: Engine, name: str, folder: Path, **options: Any) -> Outcome:
    session, alone = engine.session(name, **options), engine.alone(name, **options)
    for one in (session, alone):
        one.train(range(4))
    compare("After training", session, alone)
    return Outcome(RIGHT)


def built_after_an_evaluation(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(None), engine.alone(name)
    assert isinstance(session, TorchSession)
    session.evaluate()
    session.build(name)
    for one in (session, alone):
        one.train(range(3))
    compare("After training", session, alone)
    return Outcome(RIGHT)


def trained_after_an_evaluation(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
        one.evaluate()
        one.train(range(2, 4))
    compare("After an evaluation and training", session, alone)
    return Outcome(RIGHT)


def saved_after_an_evaluation(engine: Engine, name: str, folder: Path, **options: Any) -> Outcome:
    """Saved after it, and while the weights for evaluation are in place; the run goes on, and another one resumes."""
    for inside in (False, True):
        session, alone = engine.session(name, **options), engine.alone(name, **options)
        for one in (session, alone):
            one.train(range(2))
            with one.evaluation():
                if inside and one is session:
                    one.save(folder / str(inside))
        if not inside:
            session.save(folder / str(inside))
        resumed = engine.session(name, **options)
        resumed.load(folder / str(inside))
        resumed.mode(True)
        for one in (session, alone, resumed):
            one.train(range(2, 4))
        compare("After it was saved", session, alone)
        compare("Resumed", resumed, alone)
    return Outcome(RIGHT)


def loaded_after_an_evaluation(engine: Engine, name: str, folder: Path, **options: Any) -> Outcome:
    """Loaded after it, and while the weights for evaluation are in place."""
    session, alone = engine.session(name, **options), engine.alone(name, **options)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    alone.train(range(2, 4))
    for inside in (False, True):
        session.train(range(4, 5))
        with session.evaluation():
            if inside:
                session.load(folder)
        if not inside:
            session.load(folder)
        session.train(range(2, 4))
        compare("Loaded after an evaluation", session, alone)
    return Outcome(RIGHT)


def loaded_onto_a_used_optimizer(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    session.train(range(2, 4))
    session.load(folder)
    for one in (session, alone):
        one.train(range(2, 5))
    compare("After the load", session, alone)
    return Outcome(RIGHT)


def loaded_without_state(engine: Engine, name: str, folder: Path) -> Outcome:
    """Saved before the first step."""
    session, alone = engine.session(name), engine.alone(name)
    session.save(folder)
    session.train(range(3))
    session.load(folder)
    for one in (session, alone):
        one.train(range(3))
    compare("After the load", session, alone)
    return Outcome(RIGHT)


def loaded_with_partial_state(engine: Engine, name: str, folder: Path) -> Outcome:
    """Saved when a layer had no gradient yet."""
    session, alone = engine.session(name, idle_until=2), engine.alone(name, idle_until=2)
    for one in (session, alone):
        one.train(range(1))
    session.save(folder)
    session.train(range(1, 4))
    session.load(folder)
    for one in (session, alone):
        one.train(range(1, 4))
    compare("After the load", session, alone)
    return Outcome(RIGHT)


def rate_differs(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    before, factor = session.weights(), 2.0 if is_last() else 1.0
    session.backward(2)
    for group in session.groups():
        group["lr"] *= factor
    outcome = refusal(RanksDisagreeError, session.step)
    unchanged(session, before)
    if not engine.is_zero:  # DeepSpeed has freed the gradients
        for group in session.groups():
            group["lr"] /= factor
        session.step()
        alone.train([2])
        compare("With equal rates again", session, alone)
    return outcome


def gradient_missing(engine: Engine, name: str, folder: Path) -> Outcome:
    """The last rank's gradients of one layer are thrown away."""
    session = engine.session(name)
    assert isinstance(session, TorchSession)
    session.train(range(2))
    before = session.weights()
    session.backward(2)
    for fqn, parameter in session.model.named_parameters():
        if is_last() and "head" in fqn:
            parameter.grad = None
    outcome = refusal(RanksDisagreeError, session.step)
    unchanged(session, before)
    return outcome


def layer_unused(engine: Engine, name: str, folder: Path) -> Outcome:
    """The last rank's forward pass leaves a layer out, in one step: the engine averages what there is."""
    session, alone = engine.session(name, unused=True), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.idle_until = 3 if is_last() else 0
    session.train([2])
    ranks = dist.get_world_size()
    gradients: dict[str, Tensor] = {}
    for without in (False, True):
        alone.idle_until = 3 if without else 0
        alone.backward(2)
        for fqn, parameter in alone.model.named_parameters():
            if parameter.grad is not None:
                part = parameter.grad / ranks * (1 if without else ranks - 1)
                gradients[fqn] = gradients[fqn] + part if fqn in gradients else part
            parameter.grad = None
    for fqn, parameter in alone.model.named_parameters():
        parameter.grad = gradients[fqn]
    alone.step()
    session.idle_until = alone.idle_until = 0
    for one in (session, alone):
        one.train([3])
    compare("After a step in which one rank left a layer out", session, alone)
    return Outcome(RIGHT)


def step_fails(engine: Engine, name: str, folder: Path) -> Outcome:
    """The last rank runs out of memory in the upstream step; then back to the checkpoint, as the error says."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    session.backward(2)
    error = torch.OutOfMemoryError("out of memory. Tried to allocate 20 MiB")
    failing = [mock.patch.object(one.optimizer, "step", side_effect=error) for one in session.instances()]
    for patch in failing if is_last() else []:
        patch.start()
    outcome = refusal(StepFailedError, session.step)
    for patch in failing if is_last() else []:
        patch.stop()
    refusal(CheckpointError, lambda: session.save(folder.with_name("half")))
    if engine.is_zero:
        refusal(CheckpointError, lambda: session.load(folder))
        session.backward(2)
        refusal(StepFailedError, session.step)
    resumed = engine.session(name)
    resumed.load(folder)
    for one in (resumed, alone):
        one.train(range(2, 4))
    compare("Resumed after the failed step", resumed, alone)
    return outcome


def upstream_fails_on_nan(engine: Engine, name: str, folder: Path) -> Outcome:
    """The last rank's gradients turn into NaN, of which no SVD is taken; saved at once, then loaded in place."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    session.backward(2)
    spoil(session)
    outcome = refusal(StepFailedError, session.step)
    refusal(CheckpointError, lambda: session.save(folder.with_name("half")))
    assert isinstance(session, TorchSession)
    refusal(StateDictError, session.optimizers[0].state_dict)
    session.optimizers[0].zero_grad()
    session.load(folder)
    for one in (session, alone):
        one.train(range(2, 4))
    session.save(folder.with_name("whole"))
    compare("Loaded after the failed step", session, alone)
    return outcome


def spoil(session: Session, value: float = math.nan, everywhere: bool = False) -> None:
    """The first element of what the last rank holds of each gradient."""
    for parameter in session.module().parameters():
        part = None if parameter.grad is None else local_of(parameter.grad)
        if part is not None and part.numel() and (everywhere or is_last()):
            part.view(-1)[0] = value


def nonfinite(
    engine: Engine, name: str, folder: Path, choice: str, goes_on: Callable[[TorchSession, TorchSession], Outcome]
) -> Outcome:
    """Two steps with a choice for infinite gradients, which DeepSpeed makes itself; then ``goes_on``."""
    options = {"extra": {"on_nonfinite": choice}}
    if engine.is_zero:
        return refusal(UnsupportedError, lambda: engine.session(name, **options))
    session, alone = engine.session(name, **options), engine.alone(name)
    assert isinstance(session, TorchSession)
    for one in (session, alone):
        one.train(range(2))
    return goes_on(session, alone)


def refused_if_nonfinite(session: TorchSession, alone: TorchSession) -> Outcome:
    """An infinite gradient on the last rank: nothing is changed, and a step by good gradients is right."""
    before = session.weights()
    session.backward(2)
    spoil(session, math.inf)
    outcome = refusal(NonFiniteGradientError, session.step)
    refusal(NonFiniteGradientError, lambda: session.optimizers[0].clip_grad_norm_(1.0))
    unchanged(session, before)
    session.optimizers[0].zero_grad()
    for one in (session, alone):
        one.train(range(2, 4))
    compare("After the refused step", session, alone)
    return outcome


def skipped_if_nonfinite(session: TorchSession, alone: TorchSession) -> Outcome:
    """Infinite gradients on the last rank in step 3, NaN in step 4: as if nobody had asked for these steps."""
    (optimizer,) = session.optimizers
    for step, value in ((2, math.inf), (3, math.nan)):
        session.backward(step)
        spoil(session, value)
        with logged("dist_optim") as lines:
            if step == 3:
                optimizer.clip_grad_norm_(1.0)
            session.step()
        if gather_objects(len(lines)) != [1] + [0] * (dist.get_world_size() - 1):
            raise Defect("not logged once, on rank 0")
    for one in (session, alone):
        one.train(range(4, 6))
    if set(gather_objects((optimizer.num_steps, optimizer.num_skipped_steps))) != {(4, 2)}:
        raise Defect("steps are counted wrongly")
    compare("After two steps that were left out", session, alone)
    return Outcome(RIGHT)


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What is logged under this name meanwhile, on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.propagate = False
    yield lines
    logger.removeHandler(handler)
    logger.propagate = True


def scaled_step(engine: Engine, session: Any, optimizer: Any, scaler: Any, number: int) -> None:
    """One of fp16's loss scaling; in the third one element overflows, in the last rank's part of the gradients."""
    scaler.scale(session.loss(number)).backward()
    if number == 2:
        is_here = engine.placement in ("none", "ddp") or dist.get_rank() % 2 == 1  # in HSDP's two replicas alike
        spoil(session, math.inf, everywhere=is_here)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def scaled(engine: Engine, name: str, folder: Path, is_sharded: bool = False) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    (optimizer,) = session.optimizers
    scaler: Any = ShardedGradScaler("cpu", 8.0) if is_sharded else torch.amp.GradScaler("cpu", 8.0)
    step = partial(scaled_step, engine, session, optimizer, scaler)
    if engine.placement.startswith("fsdp1") and not is_sharded:
        before = session.weights()
        outcome = refusal(UnsupportedError, lambda: step(0))
        unchanged(session, before)
        return outcome
    for number in range(5):
        step(number)
    alone.train([0, 1, 3, 4])
    if set(gather_objects((optimizer.num_steps, scaler.get_scale()))) != {(4, 4.0)}:
        raise Defect("ranks did not skip the same step")
    compare("After an overflow", session, alone)
    return Outcome(RIGHT)


def joined(engine: Engine, name: str, folder: Path) -> Outcome:
    """A step inside torch's Join is refused while all ranks are there; a forward pass inside it harms nothing."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession) and isinstance(session.model, DistributedDataParallel)
    before = session.weights()
    with Join([session.model]):
        session.backward(0)
        outcome = refusal(UnsupportedError, session.step)
    unchanged(session, before)
    session.optimizers[0].zero_grad()
    with Join([session.model]), torch.no_grad():
        session.loss(0)
    for one in (session, alone):
        one.train(range(3))
    compare("After Join", session, alone)
    return outcome


def toggled(engine: Engine, name: str, folder: Path) -> Outcome:
    """Layers are frozen and unfrozen in turn, after building, and while the weights for evaluation are in place."""
    session, alone = engine.session(name, unused=True), engine.alone(name)
    for one in (session, alone):
        one.train(range(1))
        one.evaluate()
        one.freeze("first")
        one.train(range(1, 3))
        one.freeze("idle")
        one.evaluate()
        one.freeze("first", False)
        one.train(range(3, 5))
        one.freeze("idle", False)
        one.train(range(5, 7))
    compare("After layers were frozen and unfrozen", session, alone)
    return Outcome(RIGHT)


def saved_while_frozen(engine: Engine, name: str, folder: Path) -> Outcome:
    """Resumed with the layer frozen before building and after it, and trainable again later."""
    session, alone = engine.session(name, unused=True), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
        one.freeze("first")
        one.train(range(2, 4))
    session.save(folder)
    resumed = engine.session(name, unused=True)
    resumed.freeze("first")
    resumed.load(folder)
    for one in (session, alone, resumed):
        one.train(range(4, 5))
        one.freeze("first", False)
        one.train(range(5, 7))
    compare("After it was saved", session, alone)
    compare("Resumed", resumed, alone)
    return Outcome(RIGHT)


def unfrozen_later(engine: Engine, name: str, folder: Path, is_listed: bool = True) -> Outcome:
    """Frozen when the model was wrapped (under DDP after that) and the optimizer built."""
    options: dict[str, Any] = {"frozen": "first", "is_listed": is_listed, "unused": True}
    session, alone = engine.session(name, **options), engine.alone(name, **{**options, "is_listed": True})
    for one in (session, alone):
        one.train(range(2))
    before = session.weights()
    for one in (session, alone):
        one.freeze("first", False)
    if engine.is_zero or not is_listed:
        outcome = refusal(ParameterError, lambda: session.train([2]))
        unchanged(session, before)
        return outcome
    session.save(folder)
    resumed = engine.session(name, **options)
    resumed.load(folder)
    resumed.freeze("first", False)
    for one in (session, alone, resumed):
        one.train(range(2, 4))
    compare("After it was unfrozen", session, alone)
    compare("Resumed, and unfrozen", resumed, alone)
    return Outcome(RIGHT)


def wrapped_frozen(engine: Engine, name: str, folder: Path) -> Outcome:
    """DDP reduces no gradient of what was frozen when it wrapped the model."""
    session = engine.session(name, frozen="first", is_listed=True, is_wrapped_frozen=True, differs=True, unused=True)
    session.train(range(2))
    before = session.weights()
    session.freeze("first", False)
    outcome = refusal(RanksDisagreeError, lambda: session.train([2]))
    unchanged(session, before)
    return outcome


def save_fails(engine: Engine, name: str, folder: Path) -> Outcome:
    """One rank cannot write: the run goes on, and the checkpoint that was there before is whole."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    outcomes = []
    writers = {0} if engine.stage == 0 else {0, dist.get_world_size() - 1}
    for rank in sorted(writers):
        for one in (session, alone):
            one.train([2])
        unwritable = out_of_reach(folder, on_rank=rank)
        outcomes.append(refusal(CheckpointError, partial(session.save, unwritable)))
        compare("After the save that failed", session, alone)
    session.train([2])
    session.load(folder)
    alone = engine.alone(name)
    alone.train(range(4))
    session.train(range(2, 4))
    compare("Resumed from the checkpoint before", session, alone)
    return outcomes[-1]


def load_fails(engine: Engine, name: str, folder: Path) -> Outcome:
    """One rank does not see the folder, or finds a damaged one; loaded again, when that is over, the run goes on."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    expected = RanksDisagreeError if engine.is_zero else CheckpointError  # DeepSpeed looks for the newest folder first
    outcomes = []
    for rank in sorted({0, dist.get_world_size() - 1}):
        session.train([2])
        unreadable = out_of_reach(folder, on_rank=rank)
        outcomes.append(refusal(expected, partial(session.load, unreadable)))
    with damaged(sorted([*folder.rglob("*_states.pt"), *(folder / "optimizer").rglob("*.distcp")])[-1]):
        outcomes.append(refusal(CheckpointError, lambda: session.load(folder)))
    session.load(folder)
    for one in (session, alone):
        one.train(range(2, 4))
    compare("Loaded again", session, alone)
    return outcomes[0]


def resumed_by_one_process(engine: Engine, name: str, folder: Path) -> Outcome:
    """Saved under the engine, resumed by each rank for itself."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
    session.save(folder)
    resumed = engine.alone(name)
    if engine.is_zero:
        return refusal(CheckpointError, lambda: resumed.load(folder))
    resumed.load(folder)
    for one in (resumed, alone):
        one.train(range(2, 4))
    compare("Resumed", resumed, alone)
    return Outcome(RIGHT)


def resumed_without_the_wrapper(engine: Engine, name: str, folder: Path) -> Outcome:
    """Saved under the engine, resumed by all ranks on a plain model, whose gradients nobody reduces."""
    session = engine.session(name)
    session.train(range(2))
    session.save(folder)
    resumed = TorchSession(ONE_PROCESS, name, differs=True)
    resumed.load(folder)
    before = resumed.weights()
    outcome = refusal(RanksDisagreeError, lambda: resumed.train([2]))
    unchanged(resumed, before)
    return outcome


def unreduced_later(engine: Engine, name: str, folder: Path) -> Outcome:
    """Step 4 comes after a backward pass in ``no_sync()``, on batches that differ."""
    session = engine.session(name, differs=True)
    session.train(range(3))
    before = session.weights()
    with session.without_reduction():
        session.backward(3)
    shows_whole_gradients = engine.placement.startswith("fsdp1")
    outcome = refusal(UnsupportedError if shows_whole_gradients else RanksDisagreeError, session.step)
    unchanged(session, before)
    return outcome


def gradients_differ(engine: Engine, name: str, folder: Path) -> Outcome:
    """The last rank scales what it holds of the reduced gradients."""
    session = engine.session(name)
    assert isinstance(session, TorchSession)
    session.train(range(2))
    before = session.weights()
    session.backward(2)
    for parameter in session.model.parameters():
        if is_last() and parameter.grad is not None:
            parameter.grad.mul_(0.5)
    outcome = refusal(RanksDisagreeError, session.step)
    unchanged(session, before)
    return outcome


def reduced_later(engine: Engine, name: str, folder: Path, only_inside: bool = False) -> Outcome:
    """FSDP2 shows no gradient until it has reduced it: the step does nothing, and the next one has the sum."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    for one in (session, alone):
        one.train(range(2))
    with session.without_all_reduce() if only_inside else session.without_reduction():
        session.backward(2)
        session.step()
    alone.step()
    alone.backward(2)
    for one in (session, alone):
        one.train(range(3, 5))
    compare("After the step that reduces", session, alone)
    return Outcome(RIGHT)


EVALUATING = ("adamw_torch", "galore_adamw", "schedule_free_adamw")
ZERO = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3")
ALONE = {"one process": "there is one rank"}
HSDP_ONLY = {engine.title: "there is no second axis" for engine in ENGINES if engine.title != "HSDP"}


def zero(reason: str) -> dict[str, str]:
    return dict.fromkeys(ZERO, reason)


SCALES = "DeepSpeed scales the loss itself"
UNITS = "ranks must run the same layers: the engine's own collectives part otherwise"
SITUATIONS = (
    Situation(
        "evaluated, then the optimizer is built",
        built_after_an_evaluation,
        EVALUATING,
        zero("the engine builds the optimizer with itself"),
    ),
    Situation("evaluated, then trained", trained_after_an_evaluation, EVALUATING),
    Situation("evaluated, then saved and resumed", saved_after_an_evaluation, EVALUATING),
    Situation("evaluated, then loaded", loaded_after_an_evaluation, EVALUATING),
    Situation("mixed precision (bf16)", partial(trained, mixed=True), (*EVALUATING, "adafactor")),
    Situation("mixed precision, evaluated, then saved", partial(saved_after_an_evaluation, mixed=True), EVALUATING),
    Situation("mixed precision, evaluated, then loaded", partial(loaded_after_an_evaluation, mixed=True), EVALUATING),
    Situation("loaded onto a used optimizer", loaded_onto_a_used_optimizer, (*EVALUATING, "adafactor")),
    Situation("loaded from before the first step", loaded_without_state, EVALUATING),
    Situation("loaded from before a layer's first gradient", loaded_with_partial_state, EVALUATING),
    Situation(
        "two optimizers on one model",
        trained,
        ("muon + adamw_torch", "adafactor + schedule_free_adamw"),
        zero("DeepSpeed's engine takes one optimizer"),
    ),
    Situation(
        "two optimizers, evaluated, then saved",
        saved_after_an_evaluation,
        ("muon + adamw_torch", "adafactor + schedule_free_adamw"),
        zero("DeepSpeed's engine takes one optimizer"),
    ),
    Situation("a learning rate differs on one rank", rate_differs, not_for=ALONE),
    Situation(
        "a gradient is missing on one rank",
        gradient_missing,
        not_for={**ALONE, **zero("DeepSpeed keeps the gradients itself")},
    ),
    Situation(
        "one rank leaves a layer out",
        layer_unused,
        not_for={**ALONE, **dict.fromkeys(("FSDP1", "FSDP2", "HSDP", *ZERO[1:]), UNITS)},
    ),
    Situation(
        "one rank fails in the step",
        step_fails,
        EVALUATING,
        {"one process": "there is one rank, and upstream's own error is raised"},
    ),
    Situation(
        "upstream fails on a NaN gradient, and the run is saved",
        upstream_fails_on_nan,
        ("galore_adamw",),
        {
            "one process": "there is one rank, and upstream's own error is raised",
            **zero("DeepSpeed leaves such a step out"),
        },
    ),
    Situation(
        "an infinite gradient on one rank, raised",
        partial(nonfinite, choice="raise", goes_on=refused_if_nonfinite),
        EVALUATING,
    ),
    Situation(
        "an infinite gradient on one rank, skipped",
        partial(nonfinite, choice="skip", goes_on=skipped_if_nonfinite),
        EVALUATING,
    ),
    Situation("loss scaling, an overflow on one rank", scaled, not_for=zero(SCALES)),
    Situation("loss scaling by ShardedGradScaler", partial(scaled, is_sharded=True), not_for=zero(SCALES)),
    Situation(
        "a step inside torch's Join",
        joined,
        not_for={engine.title: "Join takes DDP alone" for engine in ENGINES if engine.title != "DDP"},
    ),
    Situation("layers are frozen and unfrozen", toggled, EVALUATING),
    Situation("saved and resumed while a layer is frozen", saved_while_frozen, EVALUATING),
    Situation("frozen at building, in a group, unfrozen later", unfrozen_later, EVALUATING),
    Situation("frozen at building, in no group, unfrozen later", partial(unfrozen_later, is_listed=False)),
    Situation(
        "frozen when DDP wrapped the model, unfrozen later",
        wrapped_frozen,
        not_for={engine.title: "the rows above" for engine in ENGINES if engine.title != "DDP"},
    ),
    Situation("one rank fails in a save", save_fails, EVALUATING),
    Situation("one rank fails in a load", load_fails, EVALUATING),
    Situation("resumed by one process", resumed_by_one_process, EVALUATING),
    Situation(
        "resumed on several ranks without the engine",
        resumed_without_the_wrapper,
        not_for={**ALONE, **zero("DeepSpeed's files load through its engine alone: the row above")},
    ),
    Situation(
        "gradients not reduced in a later step",
        unreduced_later,
        not_for={
            **ALONE,
            "FSDP2": "no gradient is shown until it is reduced: the row below",
            "HSDP": "no gradient is shown until it is reduced: the rows below",
            "ZeRO-1": "DeepSpeed finds no gradients, and raises a TypeError of its own on all ranks",
            **dict.fromkeys(("ZeRO-2", "ZeRO-3"), "DeepSpeed has no no_sync() for these stages"),
        },
    ),
    Situation(
        "a rank changes its reduced gradients",
        gradients_differ,
        not_for={
            **ALONE,
            **dict.fromkeys(("FSDP1", "FSDP2"), "no other rank holds the same gradients"),
            **zero("DeepSpeed keeps the gradients itself"),
        },
    ),
    Situation(
        "gradients reduced a step later",
        reduced_later,
        not_for={engine.title: "the row above" for engine in ENGINES if engine.title not in ("FSDP2", "HSDP")},
    ),
    Situation(
        "gradients reduced between replicas a step later", partial(reduced_later, only_inside=True), not_for=HSDP_ONLY
    ),
)


def cell(situation: Situation, engine: Engine) -> Outcome:
    """The body of a cell, on every rank: the outcome of all its optimizers."""
    outcomes: dict[str, Outcome] = {}
    for name in situation.optimizers:
        shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared)
        with _removed(Path(shared[0])), contextlib.redirect_stdout(io.StringIO()):
            try:
                outcomes[name] = situation.body(engine, name, Path(shared[0]) / "checkpoint")
            except Defect as defect:
                return Outcome(DEFECT, f"{name}: {defect}")
    kinds = {outcome.kind for outcome in outcomes.values()}
    if len(kinds) > 1:
        return Outcome(DEFECT, f"optimizers differ: { {name: str(outcome) for name, outcome in outcomes.items()} }")
    return outcomes[situation.optimizers[0]]


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Gone afterwards, when all ranks are done with it."""
    try:
        yield
    finally:
        gather_objects(None)
        shutil.rmtree(folder, ignore_errors=True)
