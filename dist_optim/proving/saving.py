"""Whether a run that is saved and loaded goes on as if it had not been: by the code that saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_optim.generators import generators_kept
from dist_optim.proving.scenario import Scenario
from dist_optim.proving.subject import Context, Subject, copied, run
from dist_optim.specs.registry import OptimizerSpec

__all__ = ["why_not_saved"]

AT, STEPS_AFTER = 40, 20
"""After which step everything is moved into a new instance, and how far that goes on."""


def why_not_saved(spec: OptimizerSpec, scenario: Scenario, arguments: Mapping[str, Any], around_step: Context) -> str:
    """Why a continued run is not the same run; empty where it is."""
    at = min(AT, len(scenario.steps) // 2)
    later = range(at + 1, min(at + STEPS_AFTER, len(scenario.steps)))
    if not later:
        return ""
    subject = Subject(spec, scenario, arguments)
    run(subject, [at])
    try:
        resumed = _moved(subject, spec, scenario, arguments, around_step)
    except Exception as error:
        return f"its state after step {at} cannot be moved: {type(error).__name__}: {error}"
    with generators_kept():
        expected = run(subject, later, start=at + 1)
    try:
        goes_on = run(resumed, later, start=at + 1)
    except Exception as error:
        return f"moved after step {at}, it fails: {error}"
    for step, snapshot in goes_on.items():
        if difference := snapshot.first_difference(expected[step]):
            return f"moved after step {at}: {difference} differs by step {step}"
    return ""


def _moved(
    subject: Subject, spec: OptimizerSpec, scenario: Scenario, arguments: Mapping[str, Any], around_step: Context
) -> Subject:
    """A new instance with the weights, the group values and the encoded state of another."""
    weights = {index: parameter.detach().clone() for index, parameter in subject.parameters.items()}
    fresh = Subject(spec, scenario, arguments, weights=weights, around_step=around_step)
    fresh.rates = subject.rates
    fresh.extras.write({key: _cloned(value) for key, value in subject.extras.read().items()})
    for ours, theirs in zip(fresh.optimizer.param_groups, subject.optimizer.param_groups, strict=True):
        ours.update({key: _cloned(value) for key, value in theirs.items() if key not in ("params", "param_names")})
    numbers = [number for number, group in enumerate(scenario.groups) for _ in group["params"]]
    for index, parameter in subject.parameters.items():
        state = spec.driver.read_state(subject.optimizer, parameter)
        if state:
            encoded = {key: _cloned(value) for key, value in spec.driver.encode_state(state).items()}
            decoded = spec.driver.decode_state(encoded, fresh.optimizer.param_groups[numbers[index]])
            spec.driver.write_state(fresh.optimizer, fresh.parameters[index], decoded)
    return fresh


def _cloned(value: Any) -> Any:
    return copied(value) if isinstance(value, torch.Tensor) else value
