"""Whether a run that is saved and loaded goes on as if it had not been: tried, and told, not demanded here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_optim.proving.scenario import Scenario
from dist_optim.proving.subject import Context, Snapshot, Subject, copied, run
from dist_optim.specs.registry import OptimizerSpec

__all__ = ["why_not_saved"]

AT = (40, 100)
"""After which steps the state is moved into a new instance."""


def why_not_saved(
    spec: OptimizerSpec,
    scenario: Scenario,
    arguments: Mapping[str, Any],
    together: Mapping[int, Snapshot],
    around_step: Context,
) -> str:
    """Why a continued run is not the same run; empty where it is."""
    for at in AT:
        later = [step for step in together if at < step]
        if at not in together or not later:
            continue
        subject = Subject(spec, scenario, arguments)
        try:
            run(subject, [at])
            resumed = _moved(subject, spec, scenario, arguments, around_step)
        except Exception as error:
            return f"its state after step {at} cannot be moved: {type(error).__name__}: {error}"
        try:
            goes_on = run(resumed, later[:3], start=at + 1)
        except Exception as error:
            return f"moved after step {at}, it fails: {error}"
        for step, snapshot in goes_on.items():
            difference = snapshot.first_difference(together[step])
            if difference:
                return f"moved after step {at}: {difference} differs by step {step}"
    return ""


def _moved(
    subject: Subject, spec: OptimizerSpec, scenario: Scenario, arguments: Mapping[str, Any], around_step: Context
) -> Subject:
    """A new instance with the weights, the group values and the encoded state of another."""
    weights = {index: parameter.detach().clone() for index, parameter in subject.parameters.items()}
    fresh = Subject(spec, scenario, arguments, weights=weights, around_step=around_step)
    fresh.rates = subject.rates
    for ours, theirs in zip(fresh.optimizer.param_groups, subject.optimizer.param_groups, strict=True):
        ours.update({key: _cloned(value) for key, value in theirs.items() if key != "params"})
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
