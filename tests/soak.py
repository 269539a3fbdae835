"""A long run in which everything happens: evaluations, freezing, a schedule, saves, a rank that fails, resumes.

What belongs to the training (the schedule, what is frozen, evaluations, whose swaps round) is the same in the plain run
of one process; what interrupts it (saves, failures, resumes) is not in it. Both end on the same bits.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from sessions import OPTIONS, Engine, Session
from situations import compare, refusal

from dist_optim.errors import CheckpointError, StepFailedError
from dist_optim.ranks.agreement import gather_objects

FROZEN = ((), ("first",), ("idle",), ("first", "idle"))
MEAN_STEPS_BETWEEN = {"freezing": 15, "evaluation": 20, "save": 25, "failure": 60, "resume": 80}


@dataclass(frozen=True)
class Script:
    """What happens in a run, by step; drawn from a seed."""

    num_steps: int
    frozen: dict[int, tuple[str, ...]]
    """From this step on."""
    evaluations: frozenset[int]
    saves: frozenset[int]
    """After this step."""
    failures: dict[int, int]
    """In this step, on this rank."""
    resumes: frozenset[int]
    """Before this step, by new objects."""

    def rate(self, step: int) -> float:
        """Of the schedule, as a factor: a warm-up, then a cosine."""
        warmup = max(1, self.num_steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (self.num_steps - warmup))

    def counts(self) -> dict[str, int]:
        """How often each of it happens."""
        return {
            "steps": self.num_steps,
            "freezings": len(self.frozen),
            "evaluations": len(self.evaluations),
            "saves": len(self.saves),
            "failures": len(self.failures),
            "resumes": len(self.resumes),
        }


def script(seed: int, num_steps: int, num_ranks: int, density: float = 1.0) -> Script:
    """The same on every rank and machine.

    Args:
        seed: Of Python's generator.
        num_steps: Of the plain run; what is repeated after failures and resumes comes on top.
        num_ranks: To choose the rank that fails from.
        density: How much more often than usual things happen.
    """
    generator = random.Random(seed)
    at = {
        kind: [step for step in range(num_steps) if generator.random() < density / mean]
        for kind, mean in MEAN_STEPS_BETWEEN.items()
    }
    return Script(
        num_steps,
        {step: generator.choice(FROZEN) for step in at["freezing"]},
        frozenset(at["evaluation"]),
        frozenset(at["save"]),
        {step: generator.randrange(num_ranks) for step in at["failure"]},
        frozenset(at["resume"]),
    )


class Life:
    """A session that lives through a script."""

    def __init__(self, script: Script, engine: Engine, name: str) -> None:
        self.script = script
        self.make = lambda: engine.session(name, unused=True)
        self.lr = OPTIONS[name]["lr"]
        self.session: Session = self.make()

    def take(self, step: int) -> None:
        """What the plain run does in a step."""
        self.prepare(step)
        self.session.step()
        if step in self.script.evaluations:
            self.session.evaluate()

    def freeze(self, step: int) -> None:
        """What is frozen in this step."""
        now = max((at for at in self.script.frozen if at <= step), default=None)
        chosen = () if now is None else self.script.frozen[now]
        for layer in ("first", "idle"):
            self.session.freeze(layer, layer in chosen)

    def prepare(self, step: int) -> None:
        self.freeze(step)
        for group in self.session.groups():
            group["lr"] = self.lr * self.script.rate(step)
        self.session.backward(step)


def plain(script: Script, engine: Engine, name: str) -> Session:
    """One process, without interruptions."""
    life = Life(script, engine, name)
    life.session = engine.alone(name)
    for step in range(script.num_steps):
        life.take(step)
    return life.session


def interrupted(script: Script, engine: Engine, name: str, folder: Path) -> tuple[Session, Counter[str]]:
    """The run under the engine; and what was done, repetitions included."""
    life, done = Life(script, engine, name), Counter[str]()
    failures, resumes = dict(script.failures), set(script.resumes)
    saved, step = -1, 0
    save(life, folder, saved)
    while step < script.num_steps:
        if step in resumes:
            resumes.remove(step)
            life.session = life.make()
        elif step in failures:
            fail(life, step, failures.pop(step), folder)
        else:
            life.take(step)
            done["steps"] += 1
            if step in script.saves:
                save(life, folder, step)
                saved = step
            step += 1
            continue
        life.freeze(saved)  # before the load, as DeepSpeed wants it
        life.session.load(folder / str(saved))
        step = saved + 1
    return life.session, done


def save(life: Life, folder: Path, step: int) -> None:
    before = sorted(folder.iterdir()) if folder.exists() else []
    gather_objects(None)
    life.session.save(folder / str(step))
    if dist.get_rank() == 0:
        for old in before:
            if old.name != str(step):
                shutil.rmtree(old)
    gather_objects(None)


def fail(life: Life, step: int, rank: int, folder: Path) -> None:
    """A rank fails in upstream's step: all raise, and none saves what is left."""
    life.prepare(step)
    error = MemoryError("no room")
    failing = [mock.patch.object(one.optimizer, "step", side_effect=error) for one in life.session.instances()]
    for patch in failing if dist.get_rank() == rank else []:
        patch.start()
    refusal(StepFailedError, life.session.step)
    for patch in failing if dist.get_rank() == rank else []:
        patch.stop()
    refusal(CheckpointError, lambda: life.session.save(folder / "half"))
    for parameter in life.session.module().parameters():
        parameter.grad = None
    if life.session.engine.is_zero:  # its engine keeps half of the step
        life.session = life.make()


def soak(engine: Engine, name: str, seed: int, num_steps: int, density: float = 1.0) -> dict[str, Any]:
    """On every rank: both runs; what happened, and that their weights are equal to the bit.

    Raises:
        Defect: They are not, or a failure did not end as it should.
    """
    drawn = script(seed, num_steps, engine.num_ranks, density)
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    try:
        session, done = interrupted(drawn, engine, name, folder / "checkpoints")
        compare(f"After {num_steps} steps", session, plain(drawn, engine, name))
    finally:
        gather_objects(None)
        shutil.rmtree(folder, ignore_errors=True)
    return {**drawn.counts(), "steps with repetitions": done["steps"], "differing bits": 0}
