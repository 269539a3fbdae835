"""More rows of docs/situations.md: what scripts write into their loops, local and right with a stock optimizer."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import situations
import torch
from placements import full_parameters, own_group
from sessions import ENGINES, Engine, Session, TorchSession, ZeroSession
from situations import ALONE, RIGHT, Outcome, Situation, refusal, unchanged, zero
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.checkpoint import state_dict as torch_doors
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_optim.errors import RanksDisagreeError, UnsupportedError
from dist_optim.ranks.agreement import own_rank

DIFFERENT = ("adamw_torch", "galore_adamw", "schedule_free_adamw")


def accumulated(engine: Engine, name: str, folder: Path) -> Outcome:
    """Two backward passes for a step, the first without reduction."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(2))
        is_reduced = one is alone or engine.num_ranks == 1
        with nullcontext() if is_reduced else one.without_reduction():
            one.backward(2)
        one.backward(3)
        one.step()
        one.train([4])
    situations.compare("After an accumulated step", session, alone)
    return Outcome(RIGHT)


def two_models(engine: Engine, name: str, folder: Path) -> Outcome:
    """Each with an optimizer of its own, stepped in turn, as a generator and a discriminator are."""
    pairs = [(engine.session(name), engine.alone(name)) for _ in range(2)]
    for number in range(3):
        for at, pair in enumerate(pairs):
            for one in pair:
                one.train(range(number * (at + 1), (number + 1) * (at + 1)))
    for at, (session, alone) in enumerate(pairs):
        situations.compare(f"Model {at}", session, alone)
    return Outcome(RIGHT)


def scheduled(engine: Engine, name: str, folder: Path) -> Outcome:
    """A schedule of torch's, which is saved beside the checkpoint and resumed with it."""
    session, alone = engine.session(name), engine.alone(name)
    schedules = {id(one): schedule_of(one) for one in (session, alone)}
    for one in (session, alone):
        follow(one, schedules[id(one)], range(3))
    session.save(folder)
    held = schedules[id(session)].state_dict()
    resumed = engine.session(name)
    schedules[id(resumed)] = schedule_of(resumed)
    resumed.load(folder)
    schedules[id(resumed)].load_state_dict(held)
    for one in (session, alone, resumed):
        follow(one, schedules[id(one)], range(3, 6))
    situations.compare("After it was saved", session, alone)
    situations.compare("Resumed", resumed, alone)
    return Outcome(RIGHT)


def schedule_of(session: Session) -> LambdaLR:
    return LambdaLR(for_schedules(session), lambda step: 0.8**step)


def for_schedules(session: Session) -> torch.optim.Optimizer:
    """The optimizer that torch's schedules take."""
    if isinstance(session, TorchSession):
        return session.optimizers[0]
    assert isinstance(session, ZeroSession)
    held = session.held.optimizer  # DeepSpeed's wrapper shares its groups with the one inside
    return held if isinstance(held, torch.optim.Optimizer) else held.optimizer


def on_a_plateau(engine: Engine, name: str, folder: Path) -> Outcome:
    """A rate that falls where a loss does not, the same on all ranks."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        schedule = ReduceLROnPlateau(for_schedules(one), factor=0.5, patience=0)
        for step, loss in enumerate((1.0, 2.0, 3.0, 0.5, 0.6)):
            one.train([step])
            schedule.step(loss)
    situations.compare("After a plateau", session, alone)
    return Outcome(RIGHT)


def in_one_cycle(engine: Engine, name: str, folder: Path) -> Outcome:
    """A schedule that moves the rate and the first of the betas."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        schedule = OneCycleLR(for_schedules(one), max_lr=2e-2, total_steps=6)
        for step in range(5):
            one.train([step])
            schedule.step()
    situations.compare("In one cycle", session, alone)
    return Outcome(RIGHT)


def hooked(engine: Engine, name: str, folder: Path) -> Outcome:
    """A hook before each step changes gradients, and one after it counts."""
    session, alone = engine.session(name), engine.alone(name)
    counts = [0, 0]
    for at, one in enumerate((session, alone)):
        assert isinstance(one, TorchSession)

        def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)

        def count(*_: Any, at: int = at) -> None:
            counts[at] += 1

        one.optimizers[0].register_step_pre_hook(halve)
        one.optimizers[0].register_step_post_hook(count)
        one.train(range(4))
    if counts != [4, 4]:
        raise situations.Defect(f"hooks ran {counts} times in 4 steps")
    situations.compare("With hooks", session, alone)
    return Outcome(RIGHT)


def resumed_through_torch(engine: Engine, name: str, folder: Path, *, is_whole: bool = False) -> Outcome:
    """Into another optimizer on equal weights, whose own state was put back to the first step's.

    Where ``is_whole``, all of the state is on every rank in between.
    """
    alone, first, session = engine.alone(name), engine.session(name), engine.session(name)
    assert isinstance(first, TorchSession) and isinstance(session, TorchSession)
    options = torch_doors.StateDictOptions(full_state_dict=is_whole)
    alone.train(range(6))
    first.train(range(3))
    session.train(range(1))
    early = session.optimizers[0].state_dict()
    session.train(range(1, 3))
    session.optimizers[0].load_state_dict(early)
    saved = torch_doors.get_optimizer_state_dict(first.model, first.optimizers[0], options=options)
    torch_doors.set_optimizer_state_dict(session.model, session.optimizers[0], saved, options=options)
    session.train(range(3, 6))
    situations.compare("resumed", session, alone)
    return Outcome(RIGHT)


def handed_over(engine: Engine, name: str, folder: Path) -> Outcome:
    """``state_dict()`` of one optimizer into another on equal weights, on all ranks."""
    alone, first, session = engine.alone(name), engine.session(name), engine.session(name)
    assert isinstance(first, TorchSession) and isinstance(session, TorchSession)
    alone.train(range(6))
    first.train(range(3))
    session.train(range(3))
    session.optimizers[0].load_state_dict(first.optimizers[0].state_dict())
    session.train(range(3, 6))
    situations.compare("Gone on with another's state", session, alone)
    return Outcome(RIGHT)


def deep_copied(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    session.train(range(2))
    before = session.weights()
    outcome = refusal(UnsupportedError, lambda: copy.deepcopy(session.optimizers[0]))
    unchanged(session, before)
    alone.train(range(4))
    session.train(range(2, 4))
    situations.compare("Gone on", session, alone)
    return outcome


def follow(session: Session, schedule: LambdaLR, steps: range) -> None:
    for step in steps:
        session.train([step])
        schedule.step()


def by_closure(engine: Engine, name: str, folder: Path) -> Outcome:
    """``step(closure)``, which hands the loss on."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    losses: list[list[float]] = [[], []]
    for one, seen in zip((session, alone), losses, strict=True):
        (optimizer,) = one.optimizers
        for step in range(3):

            def closure(one: TorchSession = one, step: int = step) -> Tensor:
                one.optimizers[0].zero_grad()
                loss = one.loss(step)
                loss.backward()
                return loss

            seen.append(float(optimizer.step(closure)))
    if losses[0] != losses[1]:
        raise situations.Defect(f"losses are {losses[0]}, and those of one process {losses[1]}")
    situations.compare("After steps by a closure", session, alone)
    return Outcome(RIGHT)


def group_added(engine: Engine, name: str, folder: Path) -> Outcome:
    """A layer that was frozen at building, and in no group, is unfrozen and added in a group of its own."""
    options: dict[str, Any] = {"frozen": "first", "unused": True, "is_listed": True, "only_trainable": True}
    session, alone = engine.session(name, **options), engine.alone(name, **options)
    for one in (session, alone):
        one.train(range(2))
        add_first(one)
        one.train(range(2, 5))
    situations.compare("After a group was added", session, alone)
    return Outcome(RIGHT)


def add_first(session: Session) -> None:
    assert isinstance(session, TorchSession)
    session.freeze("first", False)
    layer = [parameter for fqn, parameter in session.model.named_parameters() if "first" in fqn.split(".")]
    session.optimizers[0].add_param_group({"params": layer, "lr": 5e-3})


def group_refused(engine: Engine, name: str, folder: Path) -> Outcome:
    session = engine.session(name, frozen="first", unused=True, is_listed=True, only_trainable=True)
    session.train(range(2))
    before = session.weights()
    outcome = refusal(UnsupportedError, lambda: add_first(session))
    unchanged(session, before)
    return outcome


class Average:
    """An exponential average of the weights, by torch's ``swa_utils``."""

    def __init__(self, session: TorchSession) -> None:
        self.session = session
        self.model = AveragedModel(session.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def train(self, steps: range) -> None:
        for step in steps:
            self.session.train([step])
            self.model.update_parameters(self.session.model)

    def weights(self) -> dict[str, Tensor]:
        return full_parameters(self.model.module)


def averaged(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    averages = [Average(session), Average(alone)]
    for one in averages:
        one.train(range(4))
    situations.compare("After training", session, alone)
    situations.compare("The average", *averages)
    return Outcome(RIGHT)


def local_steps(session: TorchSession, start: int) -> None:
    """From that step on, DDP reduces no gradient over ranks."""
    own: Any = own_group()
    state = local_sgd.PostLocalSGDState(None, own, start_localSGD_iter=start, post_local_gradient_allreduce=False)
    session.model.register_comm_hook(state, local_sgd.post_localSGD_hook)  # type: ignore[operator]


def local_sgd_is_refused(engine: Engine, name: str, folder: Path) -> Outcome:
    session = engine.session(name, differs=True)
    assert isinstance(session, TorchSession)
    local_steps(session, 2)
    session.train(range(2))
    before = session.weights()
    session.backward(2)
    outcome = refusal(RanksDisagreeError, session.step)
    unchanged(session, before)
    return outcome


def clipped_by_one(engine: Engine, name: str, folder: Path) -> Outcome:
    """Rank 0 clips between backward and step, where the others step; then all go on to the step."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    alone.train(range(4))
    session.train(range(2))
    before = session.weights()
    session.backward(2)
    (optimizer,) = session.optimizers
    outcome = refusal(RanksDisagreeError, lambda: optimizer.clip_grad_norm_(1.0) if own_rank() == 0 else session.step())
    unchanged(session, before)
    session.step()
    session.train([3])
    situations.compare("Gone on", session, alone)
    return outcome


OWN = "DeepSpeed's engine does this itself, by its JSON"
LATER = "DeepSpeed's engine takes no group later"
HELD = "DeepSpeed's engine holds the model"
STEPS_ITSELF = "DeepSpeed's wrapper has no hooks"
NOT_FSDP = {one.title: "torch cannot copy such a model" for one in ENGINES if one.title in ("FSDP1", "FSDP2", "HSDP")}
LOOPS = (
    Situation("gradients accumulated under no_sync()", accumulated, DIFFERENT, zero(OWN)),
    Situation("two models, an optimizer each", two_models, DIFFERENT),
    Situation("a schedule, saved and resumed", scheduled, DIFFERENT),
    Situation("a schedule on a plateau of the loss", on_a_plateau, DIFFERENT),
    Situation("a schedule of rate and betas (OneCycleLR)", in_one_cycle, ("adamw_torch", "galore_adamw")),
    Situation("hooks before and after each step", hooked, DIFFERENT, zero(STEPS_ITSELF)),
    Situation("step(closure)", by_closure, DIFFERENT, zero("DeepSpeed's engine takes no closure")),
    Situation("add_param_group between steps", group_added, ("adamw_torch", "schedule_free_adamw"), zero(LATER)),
    Situation("add_param_group between steps, GaLore", group_refused, ("galore_adamw",), zero(LATER)),
    Situation(
        "all of the state through torch's functions",
        partial(resumed_through_torch, is_whole=True),
        DIFFERENT[:2],
        zero(HELD),
    ),
    Situation("state_dict() into another optimizer", handed_over, DIFFERENT, zero(HELD)),
    Situation("the optimizer is copied (deepcopy)", deep_copied, DIFFERENT[:2], zero(HELD)),
    Situation("weights averaged by torch's swa_utils", averaged, DIFFERENT, {**NOT_FSDP, **zero(HELD)}),
    Situation("gradients clipped by one rank", clipped_by_one, not_for={**ALONE, **zero("DeepSpeed's engine clips")}),
    Situation(
        "local SGD by DDP's hook",
        local_sgd_is_refused,
        not_for={engine.title: "DDP's hook" for engine in ENGINES if engine.title != "DDP"},
    ),
)
"""In the order of the table."""
