"""A traced run of all tensors together: what mixed, what was read and drawn, what moved without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dist_optim.generators import Generators, read_generators
from dist_optim.proving.scenario import Scenario
from dist_optim.proving.subject import Context, Snapshot, StepFailed, Subject, copied
from dist_optim.proving.trace import Found, Perturb, Trace, is_mixed, numbers
from dist_optim.specs.driver import tensors_in
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.same_bits import same

__all__ = ["Flow", "flow_of"]

LOOK_CLOSELY = 60
"""Steps whose writes are all compared with what the trace saw; after them every tenth."""


@dataclass(slots=True)
class Flow:
    """What a traced run has seen."""

    found: Found
    generators: Generators
    """As it was left by the last step."""
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    steps_absent: bool = False
    has_moved: bool = False
    failure: StepFailed | None = None
    """Why it ended early."""


def flow_of(
    spec: OptimizerSpec,
    scenario: Scenario,
    arguments: Mapping[str, Any],
    checkpoints: Collection[int],
    *,
    perturb: Perturb | None = None,
    around_step: Context,
    is_enough: Callable[[Flow, int], bool] = lambda flow, at: False,
) -> Flow:
    """Run the schedule up to the last checkpoint, or to the step that fails.

    Args:
        perturb: Which host reads return something else.
        around_step: A context for each step.
        is_enough: Asked after every checkpoint, with its step; True ends the run.

    Raises:
        CommunicatesError: The class starts a collective.
        StepFailed: Its constructor fails.
    """
    trace = Trace(perturb)
    generators = read_generators()
    try:
        subject = Subject(spec, scenario, arguments, trace=trace, around_step=around_step)
    except Exception as error:
        raise StepFailed(-1, error) from error
    flow = Flow(trace.found, generators)
    _note_draws(flow, "its constructor")
    for at in range(max(checkpoints) + 1):
        try:
            _take(subject, trace, flow, at)
        except Exception as error:
            flow.failure = StepFailed(at, error)
            break
        if at in checkpoints:
            flow.snapshots[at] = subject.snapshot()
            if is_enough(flow, at):
                break
    return flow


def _take(subject: Subject, trace: Trace, flow: Flow, at: int) -> None:
    looks = at < LOOK_CLOSELY or at % 10 == 0
    weights = {index: one.detach().clone() for index, one in subject.parameters.items()} if looks else {}
    absent = [index for index in subject.parameters if not subject.scenario.is_present(index, at)]
    states = {index: copied(subject.state_of(index)) for index in absent}
    storages = {index: one.untyped_storage()._cdata for index, one in subject.parameters.items()}
    trace.written.clear()
    subject.take(at)
    _note_draws(flow, f"step {at}")
    for index, old in weights.items():
        parameter = subject.parameters[index]
        if same(old, parameter.detach()):
            continue
        flow.has_moved = True
        flow.steps_absent |= index in absent
        if storages[index] == parameter.untyped_storage()._cdata and storages[index] not in trace.written:
            flow.found.couple(f"weights of tensor {index} change in step {at} by no operation that torch dispatches")
    flow.steps_absent |= any(not same(old, copied(subject.state_of(index))) for index, old in states.items())
    for index, parameter in subject.parameters.items():
        _couple(flow.found, trace, index, [parameter.data], f"weights after step {at}")
        if looks:
            _couple(flow.found, trace, index, tensors_in(subject.state_of(index)), f"state after step {at}")
    for group in subject.optimizer.param_groups if looks else ():
        tensors = [value for value in group.values() if isinstance(value, Tensor)]
        if is_mixed(tags := trace.tags.of_all(tensors)):
            flow.found.couple(f"a value of a param group comes from tensors {numbers(tags)} after step {at}")


def _couple(found: Found, trace: Trace, index: int, tensors: Any, where: str) -> None:
    tags = trace.tags.of_all(tensors) | 1 << index
    if is_mixed(tags):
        found.couple(f"tensors {numbers(tags)} are mixed in the {where}")


def _note_draws(flow: Flow, where: str) -> None:
    before, flow.generators = flow.generators, read_generators()
    if not flow.found.draws and before != flow.generators:
        flow.found.draws = f"a generator of Python, numpy or torch in {where}"
