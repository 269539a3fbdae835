"""One optimizer of the class, on all tensors of a scenario or on some of them, and what becomes of them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.proving.scenario import Scenario
from dist_optim.proving.trace import Trace
from dist_optim.specs.driver import ParamGroup, as_given
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.specs.same_bits import same
from dist_optim.specs.verdict import Ghosts, Verdict
from dist_optim.stepping.extras import Extras
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["Snapshot", "StepFailed", "Subject", "copied", "run"]

Context = Callable[[], AbstractContextManager[Any]]
FALLBACK_RATE = 1e-3
"""The base learning rate, where the user's is 0."""


@dataclass(slots=True)
class Snapshot:
    """Copies of all that is compared: by tensor its weights and state; by group its values; the rest of the state."""

    tensors: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    groups: dict[int, dict[str, Any]] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    is_as_constructed: bool = True
    """Whether the rest is what the constructor left: then it may differ by what the constructor was given."""

    def first_difference(self, other: Snapshot, indices: Collection[int] | None = None) -> str:
        """What of these tensors, and of the groups that both have, is not equal to the bit; empty where all is."""
        for index in self.tensors.keys() & other.tensors.keys():
            if indices is not None and index not in indices:
                continue
            if not same(self.tensors[index][0], other.tensors[index][0]):
                return f"weights of tensor {index}"
            if not same(self.tensors[index][1], other.tensors[index][1]):
                return f"state of tensor {index}"
        for number in self.groups.keys() & other.groups.keys():
            ours, theirs = self.groups[number], other.groups[number]
            for key in ours.keys() | theirs.keys():
                if not same(ours.get(key), theirs.get(key)):
                    return f"{key!r} in the values of group {number}"
        if self.is_as_constructed and other.is_as_constructed:
            return ""
        for key in self.rest.keys() | other.rest.keys():
            if not same(self.rest.get(key), other.rest.get(key)):
                return "what it keeps outside the state of its tensors"
        return ""


class Subject:
    """The unmodified class on tensors of a scenario, stepped through its schedule.

    Args:
        spec: Of the class.
        scenario: Whose tensors.
        arguments: Constructor keywords.
        owned: Tensors that are stepped here; all when None.
        ghosts: What stands for the others.
        around: A context in which all of the class's code runs (a trace).
        around_step: One in which its steps run (the record of lines that were reached).
        weights: Values to begin with, instead of the scenario's.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        scenario: Scenario,
        arguments: Mapping[str, Any],
        *,
        owned: Collection[int] | None = None,
        ghosts: Ghosts = "none",
        trace: Trace | None = None,
        around_step: Context = nullcontext,
        weights: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.scenario, self.trace, self.spec = scenario, trace, spec
        self._around_step = around_step
        placed = scenario.placed
        self.owned = sorted(range(len(placed)) if owned is None else owned)
        starts = {index: placed[index].local() for index in self.owned} if weights is None else weights
        self._instance: UpstreamInstance | None = None
        arguments = {key: _own(value) for key, value in arguments.items()}
        if ghosts == "none":
            self.parameters = {index: nn.Parameter(starts[index].clone()) for index in self.owned}
            self._tag(self.parameters)
            groups = self._groups_of_owned()
            with self._traced():
                self.optimizer: Optimizer = spec.driver.construct(spec.load_class(), as_given(groups), arguments)
                if Trait.WEIGHT_SWAPPING in spec.traits:
                    self.optimizer.train()  # type: ignore[attr-defined]
        else:
            claim = Verdict(name=spec.name, is_independent=True, reason="to be shown", ghosts=ghosts)
            shapes = {index: placed[index].shape for index in self.owned}
            groups = [{key: _own(value) for key, value in group.items()} for group in scenario.groups]
            values = {index: starts[index].clone() for index in self.owned}
            self._instance = UpstreamInstance(replace(spec, verdict=claim), groups, shapes, arguments, values)
            self.parameters, self.optimizer = self._instance.shadows, self._instance.optimizer
        self.extras = (self._instance and self._instance.extras) or Extras({"": self.optimizer}, self.parameters)
        self.rates = [group.get("lr") for group in self.optimizer.param_groups]
        self.rates = [_own(rate) if isinstance(rate, (float, int, Tensor)) else None for rate in self.rates]

    def _groups_of_owned(self) -> list[ParamGroup]:
        groups, index = [], 0
        for group in self.scenario.groups:
            members = range(index, index + len(group["params"]))
            index += len(group["params"])
            owned = [at for at in members if at in self.parameters]
            made = {key: _own(value) for key, value in group.items() if key != "params"}
            if self.spec.driver.wants_names or "param_names" in group:
                made["param_names"] = [self.scenario.placed[at].fqn for at in owned]
            groups.append({**made, "params": [self.parameters[at] for at in owned]})
        return groups

    def _traced(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.trace is None else self.trace

    def _tag(self, tensors: Mapping[int, Tensor]) -> None:
        if self.trace is not None:
            for index, tensor in tensors.items():
                self.trace.tags.put(tensor, 1 << index)

    # Stepping -----------------------------------------------------------------------------------------------------

    def take(
        self, at: int, streams: Mapping[int, int] | None = None, closure_with: Callable[[], object] | None = None
    ) -> None:
        """Take step ``at`` of the schedule.

        Args:
            at: Its number.
            streams: Which tensors' gradients come from another stream.
            closure_with: Called in each evaluation of the closure; gives a closure where the schedule has none.
        """
        step = self.scenario.steps[at]
        if step.rate is not None:
            self._set_rates(step.rate)
        gradients = {
            index: self.scenario.gradient(index, at, (streams or {}).get(index, 0))
            for index in self.owned
            if self.scenario.is_present(index, at)
        }
        self._tag(gradients)
        if self.trace is not None:
            self.trace.step = at
        closure = None
        if closure_with is not None or "closure" in step.features:
            closure = self._closure(at, gradients, closure_with)
        with torch.enable_grad(), self._traced(), _handing(self.optimizer, closure), self._around_step():
            self._step(gradients, at)
        if "swap" in step.features and Trait.WEIGHT_SWAPPING in self.spec.traits:
            with self._traced():
                self.optimizer.eval()  # type: ignore[attr-defined]
                self.optimizer.train()  # type: ignore[attr-defined]

    def _step(self, gradients: Mapping[int, Tensor], at: int) -> None:
        if self._instance is not None:
            present = [self.scenario.is_present(index, at) for index in range(len(self.scenario.placed))]
            values = {index: self.parameters[index].data for index in gradients}
            self._instance.step(values, gradients, present)
            return
        for index, parameter in self.parameters.items():
            parameter.grad = gradients.get(index)
        self.spec.driver.step(self.optimizer, [self.parameters[index] for index in gradients])

    def _closure(self, at: int, gradients: Mapping[int, Tensor], note: Callable[[], object] | None) -> Any:
        """Returns a loss that does not depend on which tensors are here, and sets the gradients anew."""

        def closure() -> Tensor:
            if note is not None:
                note()
            for index, gradient in gradients.items():
                self.parameters[index].grad = gradient.clone()
            return torch.tensor(2.0 + 0.5 * (at % 3) - at / len(self.scenario.steps), requires_grad=False, device="cpu")

        return closure

    def _set_rates(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(base, Tensor):
                group["lr"].copy_((base if base.any() else base + FALLBACK_RATE) * factor)
            elif base is not None:
                group["lr"] = (base or FALLBACK_RATE) * factor

    # What has become of it ----------------------------------------------------------------------------------------

    def state_of(self, index: int) -> Any:
        """Upstream's state of one tensor."""
        return self.spec.driver.read_state(self.optimizer, self.parameters[index])

    def snapshot(self) -> Snapshot:
        """Copies of weights, state and group values, as they are now."""
        found = Snapshot()
        numbers = [number for number, group in enumerate(self.scenario.groups) for _ in group["params"]]
        for index, parameter in self.parameters.items():
            found.tensors[index] = (parameter.detach().clone(), copied(self.state_of(index)))
            number = numbers[index]
            if number not in found.groups and len(self.optimizer.param_groups) == len(self.scenario.groups):
                group = self.optimizer.param_groups[number]
                values = {key: copied(one) for key, one in group.items() if key not in ("params", "param_names")}
                found.groups[number] = values
        found.rest, found.is_as_constructed = copied(self.extras.read()), self.extras.is_as_constructed()
        return found


@contextmanager
def _handing(optimizer: Optimizer, closure: Any) -> Iterator[None]:
    """Whoever calls ``optimizer.step()`` in here hands it this closure."""
    if closure is None:
        yield
        return
    step = optimizer.step
    optimizer.step = lambda: step(closure)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step


def _own(value: Any) -> Any:
    """A value that a run may change: what the user gave stays as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (dict, list, deque)) and not any(hasattr(one, "parameter") for one in value):
        try:
            return copy.deepcopy(value)
        except Exception:  # of somebody else's object
            return value
    return value


def copied(value: Any) -> Any:
    """A nested copy of state: tensors are cloned, and what is neither data nor holds any becomes its type's name."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return {name: copied(getattr(value, name)) for name in value.__tensor_flatten__()[0]}
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {str(key) if not isinstance(key, Tensor) else "tensor": copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [copied(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return value
    if hasattr(value, "__dict__") and not callable(value):
        return copied(vars(value))
    return type(value).__name__


class StepFailed(Exception):
    """The class fails in a step of the schedule; ``at`` is its number, -1 for its constructor."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.at, self.error = at, error


def run(
    subject: Subject, checkpoints: Collection[int], *, streams: Mapping[int, int] | None = None, start: int = 0
) -> dict[int, Snapshot]:
    """Take the schedule's steps up to the last of these; returns what there was after each of them.

    Raises:
        StepFailed: With the error that the class raised.
    """
    found = {}
    for at in range(start, max(checkpoints) + 1):
        try:
            subject.take(at, streams)
        except Exception as error:
            raise StepFailed(at, error) from error
        if at in checkpoints:
            found[at] = subject.snapshot()
    return found
