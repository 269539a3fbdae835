"""Several optimizers as one: each unmodified, over param groups of its own, in one object.

Every group says under the key ``optim`` which of them steps it. The reference is the separate upstream optimizers in
one process, stepped one after the other, in the order in which the groups name them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.errors import DistOptimError, HyperparameterError
from dist_optim.specs.driver import ParamGroup, UpstreamDriver, as_given
from dist_optim.specs.hyperparameters import Hyperparameter, Scope, problem_of
from dist_optim.specs.once import Once
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.specs.verdict import Ghosts, Verdict

__all__ = ["OPTIM", "ComposedOptimizer", "ComposedSpec", "composed_spec"]

BESIDE_OTHERS = "and the optimizers beside it are stepped for one evaluation. Build it alone, on its own parameters."
OPTIM = "optim"
"""The key of a param group that names its algorithm."""
_OPTIM_RECORD = Hyperparameter(name=OPTIM, kind="str", default=None, meaning="which optimizer steps the group")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the optimizers: how it is driven, and the upstream object."""

    spec: OptimizerSpec
    optimizer: Optimizer


class ComposedOptimizer(Optimizer):
    """Upstream optimizers side by side; ``param_groups`` are theirs, the same objects, in the user's order."""

    def __init__(self, parts: Mapping[str, Part], param_groups: list[ParamGroup]) -> None:
        super().__init__(param_groups, {})
        self.param_groups = param_groups
        self._parts = dict(parts)
        self._part_of = {
            id(parameter): part
            for part in parts.values()
            for group in part.optimizer.param_groups
            for parameter in group["params"]
        }
        self.state = _StateOfParts(self._parts, self._part_of)  # type: ignore[assignment]  # looked into, as that of each part

    def holder_of(self, parameter: Tensor) -> Part:
        """Who steps this parameter."""
        return self._part_of[id(parameter)]

    def named_parts(self) -> Iterator[tuple[str, Part]]:
        """All of them."""
        yield from self._parts.items()

    def shown_parts(self) -> Iterator[Part]:
        """The optimizers that step what ``param_groups`` shows now, each with its own groups of these."""
        for name, part in self._parts.items():
            own = [group for group in self.param_groups if group[OPTIM] == name]
            if own:
                part.optimizer.param_groups = own
                yield part

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the parts in order; a closure is evaluated once, before all of them.

        A part that nobody described may ask for the loss, and gets that one; a part that asks again fails.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.shown_parts():
            shown = [one for group in part.optimizer.param_groups for one in group["params"] if one.numel()]
            if closure is not None and part.spec.is_undescribed:
                part.optimizer.step(Once(loss, part.spec.name, BESIDE_OTHERS))
            else:
                part.spec.driver.step(part.optimizer, shown)
        return loss

    def train(self) -> None:
        """Put the training weights in place, in the parts that swap weights."""
        self._swap("train")

    def eval(self) -> None:
        """Put the averaged weights in place, in the parts that swap weights."""
        self._swap("eval")

    def _swap(self, mode: str) -> None:
        for part in self.shown_parts():
            if Trait.WEIGHT_SWAPPING in part.spec.traits:
                getattr(part.optimizer, mode)()


class _StateOfParts(MutableMapping[Tensor, Any]):
    """The state of all parts, which stays theirs."""

    def __init__(self, parts: Mapping[str, Part], part_of: Mapping[int, Part]) -> None:
        self._parts, self._part_of = parts, part_of

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._part_of[id(parameter)].optimizer.state[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._part_of[id(parameter)].optimizer.state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._part_of[id(parameter)].optimizer.state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for part in self._parts.values() for parameter in part.optimizer.state)

    def __len__(self) -> int:
        return sum(len(part.optimizer.state) for part in self._parts.values())


class _StateOf(dict[str, Any]):
    """State of one parameter that knows whose it is, so that the right driver translates it."""

    driver: UpstreamDriver


@dataclass(frozen=True)
class ComposedDriver(UpstreamDriver):
    """Hands every question to the driver of the part that it concerns: by the group's ``optim``, or the parameter."""

    specs: Mapping[str, OptimizerSpec]

    def __post_init__(self) -> None:
        for name in ("wants_names", "counts_places", "rebinds_parameters"):
            object.__setattr__(self, name, any(getattr(spec.driver, name) for spec in self.specs.values()))

    def _of(self, values: Mapping[str, Any]) -> UpstreamDriver:
        return self.specs[values[OPTIM]].driver

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        """One upstream optimizer a part; ``arguments`` are those of each, by its name."""
        parts, rows = {}, {}
        for name, spec in self.specs.items():
            own = [self._own(spec, group) for group in param_groups if group[OPTIM] == name]
            parts[name] = Part(spec, _constructed(spec, own, arguments[name]))
            for group in parts[name].optimizer.param_groups:
                group[OPTIM] = name
            rows[name] = iter(parts[name].optimizer.param_groups)
        return ComposedOptimizer(parts, [next(rows[group[OPTIM]]) for group in param_groups])

    def _own(self, spec: OptimizerSpec, group: ParamGroup) -> ParamGroup:
        """The group as a part is given it alone: with names where its class wants them."""
        left_out = {OPTIM} | ({"param_names"} if self.wants_names and not spec.driver.wants_names else set())
        return {key: value for key, value in group.items() if key not in left_out}

    def keeps_precision(self, values: Mapping[str, Any]) -> bool:
        """Whether the group's algorithm does; of the arguments of all parts, whether all of them do."""
        if OPTIM in values:
            return self._of(values).keeps_precision(values)
        return all(spec.driver.keeps_precision(values[name]) for name, spec in self.specs.items())

    def runs_on_slices(self, values: Mapping[str, Any], device: torch.device) -> bool:
        """Whether the group's algorithm runs on any slice."""
        is_elementwise = Trait.ELEMENTWISE in self.specs[values[OPTIM]].traits
        return is_elementwise and self._of(values).runs_on_slices(values, device)

    def runs_on_rows(self, shape: torch.Size, fewest: int, values: Mapping[str, Any]) -> bool:
        """Whether the group's algorithm steps such rows."""
        return self._of(values).runs_on_rows(shape, fewest, values)

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        """Why the group's algorithm cannot step such a tensor."""
        reason = self._of(values).why_refused(shape, dtype, device, values)
        return f"({values[OPTIM]}) {reason}" if reason else ""

    def why_not_divided(self, dtype: torch.dtype, values: Mapping[str, Any]) -> str:
        """Why tensors of the group cannot be stepped on different ranks."""
        reason = self._of(values).why_not_divided(dtype, values)
        return f"({values[OPTIM]}) {reason}" if reason else ""

    def couples(self, values: Mapping[str, Any]) -> bool:
        """Whether one of the parts steps its tensors together: parts that do not have lost the trait."""
        return any(Trait.COUPLED in spec.traits for spec in self.specs.values())

    def undescribed(self, optimizer: Optimizer) -> dict[str, Optimizer]:
        """The parts that nobody described."""
        assert isinstance(optimizer, ComposedOptimizer)
        return {name: part.optimizer for name, part in optimizer.named_parts() if part.spec.is_undescribed}

    def step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """Step the parts in order, each with what of these parameters is its own."""
        assert isinstance(optimizer, ComposedOptimizer)
        for part in optimizer.shown_parts():
            own = [one for one in parameters if optimizer.holder_of(one) is part]
            part.spec.driver.step(part.optimizer, own)

    def take_places(self, optimizer: Optimizer, places: list[list[int]]) -> None:
        """Each part that goes by places gets those of its own groups."""
        assert isinstance(optimizer, ComposedOptimizer)
        of_group = list(zip((group[OPTIM] for group in optimizer.param_groups), places, strict=True))
        for part in optimizer.shown_parts():
            if part.spec.driver.counts_places:
                name = part.optimizer.param_groups[0][OPTIM]
                part.spec.driver.take_places(part.optimizer, [own for optim, own in of_group if optim == name])

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        """What the group's algorithm takes for such a tensor."""
        return self._of(values).step_cost(shape, values)

    def refresh_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        """As the group's algorithm has it."""
        return self._of(values).refresh_cost(shape, values)

    def read_state(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
        """State as the part keeps it."""
        part = _part(optimizer, parameter)
        state = _StateOf(part.spec.driver.read_state(part.optimizer, parameter))
        state.driver = part.spec.driver
        return state

    def write_state(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        """Install state in the part."""
        part = _part(optimizer, parameter)
        part.spec.driver.write_state(part.optimizer, parameter, state)

    def clear_state(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Leave the parameter without state in its part."""
        part = _part(optimizer, parameter)
        part.spec.driver.clear_state(part.optimizer, parameter)

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """By the driver of whom it was read from."""
        driver = state.driver if isinstance(state, _StateOf) else UpstreamDriver()
        return driver.encode_state(state)

    def decode_state(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        """By the driver of the group's algorithm."""
        return self._of(group).decode_state(encoded, group)

    def as_upstream_has_it(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        """By the driver of the group's algorithm."""
        return self._of(group).as_upstream_has_it(encoded, group)


def _constructed(spec: OptimizerSpec, groups: list[ParamGroup], arguments: Mapping[str, Any]) -> Optimizer:
    try:
        given = as_given(groups) if spec.is_undescribed else groups
        return spec.driver.construct(spec.load_class(), given, arguments)
    except DistOptimError:
        raise
    except (ValueError, TypeError) as error:
        raise HyperparameterError(
            f"{spec.name}: upstream's {spec.load_class().__name__} refuses its arguments: {error}. "
            f"They were: {', '.join(f'{key}={value!r}' for key, value in arguments.items())}."
        ) from error


def _part(optimizer: Optimizer, parameter: Tensor) -> Part:
    assert isinstance(optimizer, ComposedOptimizer)
    return optimizer.holder_of(parameter)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedSpec(OptimizerSpec):
    """The spec of several optimizers in one object: traits and hyperparameters of all of them, checked group by group.

    Constructor's arguments (``values_in``) are those of each part, by its name.
    """

    parts: Mapping[str, OptimizerSpec] = field(default_factory=dict)
    optims: tuple[str, ...] = ()
    """Which part steps each param group."""

    def load_class(self) -> type[Optimizer]:
        """The class of the object; each part has its own."""
        return ComposedOptimizer

    def records(self) -> tuple[Hyperparameter, ...]:
        """The hyperparameters of all parts; of those with one name, the first part's."""
        found = {OPTIM: _OPTIM_RECORD}
        for spec in self.parts.values():
            for record in spec.records():
                found.setdefault(record.name, record)
        return tuple(found.values())

    @property
    def is_undescribed(self) -> bool:
        """Whether one of the parts is."""
        return any(spec.is_undescribed for spec in self.parts.values())

    @property
    def packages(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(spec.package for spec in self.parts.values()))

    def in_scope(self, scope: Scope) -> tuple[str, ...]:
        """Names with this scope in a part; with the constructor's, only those that no group of any part holds."""
        every = [(record.name, record.scope) for spec in self.parts.values() for record in spec.records()]
        elsewhere = {name for name, own in every if own is not scope} if scope is Scope.CONSTRUCTOR else set()
        own = (OPTIM,) if scope is Scope.GROUP else ()
        return (*own, *dict.fromkeys(name for name, own in every if own is scope and name not in elsewhere))

    def values_in(self, group: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the group's algorithm, and the group's own values over them."""
        own = {key: value for key, value in group.items() if key != "params"}
        return {**arguments[group[OPTIM]], **own}

    def problem_in(
        self, groups: Sequence[Mapping[str, Any]], numbers: Sequence[int] | None = None
    ) -> HyperparameterError | None:
        """Every group by the hyperparameters of its own algorithm, which must be the one that it was built with."""
        for number, group in zip(range(len(groups)) if numbers is None else numbers, groups, strict=True):
            optim = self.optims[number]
            if group.get(OPTIM) != optim:
                return HyperparameterError(
                    f"{self.name}: param_groups[{number}][{OPTIM!r}] = {group.get(OPTIM)!r}, and the group was built "
                    f"to be stepped by {optim!r}. Build a new optimizer for another choice. No parameter was changed."
                )
        return problem_of(self.name, lambda group: self.parts[group[OPTIM]].records(), groups)

    def is_undescribed_in(self, group: Mapping[str, Any]) -> bool:
        """Whether the group's algorithm is."""
        return self.parts[group[OPTIM]].is_undescribed

    def ghosts_in(self, group: Mapping[str, Any]) -> Ghosts:
        """As the group's algorithm needs them."""
        return self.parts[group[OPTIM]].ghosts_in(group)

    def with_verdicts(self, parts: Mapping[str, OptimizerSpec]) -> ComposedSpec:
        """With verdicts in the parts that nobody described, and what they say together.

        Args:
            parts: All of the parts, by name.
        """
        verdicts = [spec.verdict for spec in parts.values() if spec.verdict is not None]
        return replace(composed_spec(parts, self.optims), verdict=_joined(self.name, verdicts))


def _joined(name: str, verdicts: Sequence[Verdict]) -> Verdict:
    return Verdict(
        name=name,
        is_independent=all(one.is_independent for one in verdicts),
        reason="; ".join(f"{one.name}: {one.reason}" for one in verdicts),
        refusal=next((one.refusal for one in verdicts if one.refusal), ""),
        ghosts="empty",
        steps_absent=any(one.steps_absent for one in verdicts),
        draws=any(one.draws for one in verdicts),
        needs_closure=any(one.needs_closure for one in verdicts),
        evaluations=max(one.evaluations for one in verdicts),
        unreached={file: lines for one in verdicts for file, lines in one.unreached.items()},
    )


def composed_spec(parts: Mapping[str, OptimizerSpec], optims: Sequence[str]) -> ComposedSpec:
    """One spec of several, by their names, in the order in which they are stepped.

    Args:
        parts: The specs.
        optims: Which of them steps each param group.
    """
    first = next(iter(parts.values()))
    return ComposedSpec(
        name="+".join(parts),
        load=lambda: ComposedOptimizer,
        package=first.package,
        traits=frozenset(trait for spec in parts.values() for trait in spec.traits),
        driver=ComposedDriver(parts),
        parts=dict(parts),
        optims=tuple(optims),
    )
