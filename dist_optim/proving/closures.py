"""How a class's ``step`` takes a closure: not at all, as a must, and how often it evaluates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_optim.proving.scenario import Scenario
from dist_optim.proving.subject import StepFailed, Subject
from dist_optim.proving.trace import Trace
from dist_optim.specs.registry import OptimizerSpec

__all__ = ["Closures", "closures_of"]

NUM_STEPS = 6


@dataclass(frozen=True, slots=True)
class Closures:
    """What was seen."""

    is_needed: bool
    evaluations: int
    draws: str = ""


def closures_of(spec: OptimizerSpec, scenario: Scenario, arguments: Mapping[str, Any]) -> Closures:
    """Try a few steps without a closure, and as many with one.

    Raises:
        StepFailed: The class fails with and without one.
        CommunicatesError: It starts a collective.
    """
    failure = None
    try:
        _run(spec, scenario, arguments, 1, None)
    except StepFailed as error:
        failure = error
    counts: list[int] = []
    trace = Trace()
    try:
        _run(spec, scenario, arguments, NUM_STEPS, counts, trace)
    except StepFailed:
        if failure is not None:
            raise failure from None
    return Closures(failure is not None, max(counts, default=0), trace.found.draws)


def _run(
    spec: OptimizerSpec,
    scenario: Scenario,
    arguments: Mapping[str, Any],
    num_steps: int,
    counts: list[int] | None,
    trace: Trace | None = None,
) -> None:
    at = -1
    try:
        subject = Subject(spec, scenario, arguments, trace=trace or Trace())
        for at in range(num_steps):
            if counts is None:
                subject.take(at)
                continue
            counts.append(0)

            def note(counts: list[int] = counts) -> None:
                counts[-1] += 1

            subject.take(at, closure_with=note)
    except Exception as error:
        raise StepFailed(at, error) from error
