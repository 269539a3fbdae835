"""Saves through the Trainer's and accelerate's doors that are killed, or whose disk fails, at their file-system calls.

What a load then finds is the save before, the new one, or a refusal; what else it may be is a problem. In one process:
for each call a copy of the folder before, and for a kill a child that is forked and killed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from door_runs import BesideAccelerate, BesideTraining, ByAccelerate, ByAccelerateEach, ByTrainer, Run, equal

from dist_optim.errors import CheckpointError
from dist_optim.testing import faults

KINDS: dict[str, tuple[type[Run], dict[str, int]]] = {
    "Trainer, a new folder": (ByTrainer, {"steps": 2}),
    "Trainer, over an existing one": (ByTrainer, {"steps": 3, "seed": 1}),
    "Trainer, asynchronous_saves": (BesideTraining, {"steps": 2}),
    "accelerate, a new folder": (ByAccelerateEach, {"steps": 2}),
    "accelerate, over an existing one": (ByAccelerate, {"steps": 2}),
    "accelerate, asynchronous": (BesideAccelerate, {"steps": 2}),
}
"""What saves, and the run whose save is there before; what is saved is one of three steps."""

FAULTS: dict[str, Callable[[], None]] = {
    "kill -9": faults.kill,
    "disk full": faults.disk_full,
    "read-only": faults.read_only,
}


@dataclass
class Outcomes:
    """Of one kind of save, and one fault."""

    calls: int
    """That a save makes."""
    before: int = 0
    after: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)


class Sweep:
    """One kind of save, made ready.

    Args:
        kind: One of ``KINDS``.
        folder: To work in.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.run, earlier = KINDS[kind]
        self.template, self.home = folder / "before", folder / "home"
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            first = self.run(self.template, **earlier)
            first.save()
            self.later = self.run(folder / "later", 3)
        self.before, self.after = first.bits(), self.later.bits()

    def count(self) -> int:
        """The calls of a save."""
        self.start()
        with faults.faults_below(self.home, None, lambda: None) as calls:
            self.later.save(self.home)
        return calls.count

    def at(self, fault: str, numbers: Iterable[int] | None = None) -> Outcomes:
        """What a fault at these calls, or at all, leaves behind."""
        found = Outcomes(self.count())
        for number in range(found.calls) if numbers is None else numbers:
            self.start()
            with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
                said = _killed(self, number) if fault == "kill -9" else self._fails(number, FAULTS[fault])
                ended = self.found()
                said = "" if said == "no error" and ended == "after" else said
                problem = said or ("" if hasattr(found, ended) else ended) or self._goes_on()
            if problem:
                found.problems.append(f"call {number}: {problem}")
            else:
                setattr(found, ended, getattr(found, ended) + 1)
        return found

    def start(self) -> None:
        """The folder as it was before the save."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.template, self.home)

    def save_with(self, number: int, act: Callable[[], None]) -> None:
        with faults.faults_below(self.home, number, act):
            self.later.save(self.home)

    def _fails(self, number: int, act: Callable[[], None]) -> str:
        try:
            self.save_with(number, act)
        except CheckpointError as error:
            return "" if "space" in str(error) or "Read-only" in str(error) else f"it says {error}"
        except Exception as error:
            return f"raises {type(error).__name__}: {error}"
        return "no error"

    def found(self) -> str:
        """What a load finds."""
        run = self.run(self.home, 0)
        at_first = run.bits()
        try:
            run.load(None)
        except CheckpointError as error:
            return "refused" if equal(run.bits(), at_first) else f"refused, and changed: {error}"
        except Exception as error:
            return f"a load raises {type(error).__name__}: {error}"
        found = run.bits()
        return "before" if equal(found, self.before) else "after" if equal(found, self.after) else "a mixture loads"

    def _goes_on(self) -> str:
        """The next save is made, loads, and has cleared away what was left."""
        self.later.save(self.home)
        left = [str(path.relative_to(self.home)) for path in self.home.rglob(".*") if path.name != ".metadata"]
        ended = self.found()
        return f"left for good: {left}" if left else "" if ended == "after" else f"the next save: {ended}"


def _killed(sweep: Sweep, number: int) -> str:
    child = os.fork()
    if child == 0:
        try:
            sweep.save_with(number, faults.kill)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "" if status == -9 else f"ended with {status}, and not by the kill"
