"""The black box: the same schedule with the tensors stepped apart, compared to the bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dist_optim.proving.scenario import Scenario
from dist_optim.proving.subject import Context, Snapshot, StepFailed, Subject, run
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.verdict import Ghosts

__all__ = ["checkpoints_of", "first_difference_apart", "who_sees_other_gradients"]

ALONE = 130
"""Steps over which every tensor is stepped alone."""
EVERY = 20


def checkpoints_of(scenario: Scenario) -> list[int]:
    """The steps after which all is compared."""
    last = len(scenario.steps) - 1
    return sorted({at for at in range(0, last, EVERY)} | {min(5, last), last})


def first_difference_apart(
    spec: OptimizerSpec,
    scenario: Scenario,
    arguments: Mapping[str, Any],
    together: Mapping[int, Snapshot],
    ghosts: Ghosts,
    around_step: Context,
) -> str:
    """Where tensors that are stepped apart move otherwise than together; empty where none does.

    Two halves take the whole schedule, each tensor alone the beginning of it.
    """
    count = len(scenario.placed)
    halves = [list(range(0, count, 2)), list(range(1, count, 2))] if count > 1 else []
    alone = [[index] for index in range(count)]
    nothing: list[list[int]] = [[]]  # a rank may own nothing of a round
    for owned in [*halves, *alone, *nothing]:
        checkpoints = [at for at in together if at < ALONE or len(owned) > 1] or [min(together)]
        try:
            subject = Subject(spec, scenario, arguments, owned=owned, ghosts=ghosts, around_step=around_step)
            apart = run(subject, checkpoints)
        except StepFailed as failure:
            return f"tensors {owned} alone fail in step {failure.at}: {failure}"
        except Exception as error:
            return f"tensors {owned} alone cannot be built: {type(error).__name__}: {error}"
        difference = _first_difference(apart, together, owned)
        if difference:
            return f"tensors {owned} alone: {difference}"
    return ""


def who_sees_other_gradients(
    spec: OptimizerSpec,
    scenario: Scenario,
    arguments: Mapping[str, Any],
    together: Mapping[int, Snapshot],
    around_step: Context,
) -> str:
    """What changes when other tensors get other gradients; empty where nothing does."""
    count = len(scenario.placed)
    for changed in (range(0, count, 2), range(1, count, 2)):
        subject = Subject(spec, scenario, arguments, around_step=around_step)
        try:
            other = run(subject, list(together), streams={index: 1 for index in changed})
        except StepFailed as failure:
            return f"with other gradients of tensors {list(changed)} it fails in step {failure.at}: {failure}"
        difference = _first_difference(other, together, [at for at in range(count) if at not in changed])
        if difference:
            return f"with other gradients of tensors {list(changed)}: {difference}"
    return ""


def _first_difference(ours: Mapping[int, Snapshot], theirs: Mapping[int, Snapshot], indices: Collection[int]) -> str:
    for at, snapshot in ours.items():
        difference = snapshot.first_difference(theirs[at], indices)
        if difference:
            return f"{difference} differs by step {at}"
    return ""
