"""Which algorithm steps which parameters: one for all, or several, each over param groups of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_optim.building.arguments import refuse_sparse_embeddings
from dist_optim.building.choice import resolve
from dist_optim.building.groups import KEYS_OF_TORCH, GivenParameters, arrange, listed_groups
from dist_optim.building.hidden_matrices import hidden_matrices
from dist_optim.building.patterns import LR_SCALE, by_pattern, has_patterns, meta_parameter, scaled
from dist_optim.building.stacks import convolutions_of, in_matrices, stacks_of, takes_matrices
from dist_optim.errors import HyperparameterError, ParameterError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.specs.composed import OPTIM, composed_spec
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.hyperparameters import Scope
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["Choice", "Rest", "compose"]

Choice = str | type[Optimizer]
Group = dict[str, Any]
SHARED = ("lr", "weight_decay", LR_SCALE, *KEYS_OF_TORCH)
"""What a group says to whichever algorithm steps its parameters; all else is for the one that was named."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What the user says of the parameters that the named algorithm does not take."""

    choice: Choice | None = None
    """None: what the algorithm's spec names."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Share:
    """What one algorithm steps."""

    spec: OptimizerSpec
    options: dict[str, Any]
    """Its hyperparameters, as ``build_optimizer`` takes them."""
    groups: list[tuple[int, Group]] = field(default_factory=list)
    """With the number of the user's group that each comes from."""

    @property
    def known(self) -> set[str]:
        """Names of its hyperparameters."""
        return {record.name for record in self.spec.records()}

    def add(self, number: int, group: Group) -> None:
        """Take a group, or a part of one."""
        rate = self.options.get("lr", next((one.default for one in self.spec.records() if one.name == "lr"), None))
        self.groups.append((number, scaled(group, number, rate)))


def compose(
    model: nn.Module,
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    hyperparameters: Mapping[str, Any],
    *,
    params: GivenParameters = None,
    no_decay: Iterable[str] = (),
    target_modules: str | Sequence[str] | None = None,
    rest: Rest | None = None,
    takes_idle: bool = True,
    splits_stacks: bool = False,
) -> tuple[OptimizerSpec, list[ParamGroup], dict[str, Any]]:
    """The spec of what steps all groups, param groups of placed parameters, and constructor keywords; values checked.

    Where one algorithm steps everything, that is ``spec`` itself. Otherwise it is a ``ComposedSpec``, every group says
    under ``optim`` whose it is, and the keywords are those of each algorithm, by its name. With ``splits_stacks`` each
    matrix of a stack of experts is a parameter of its own to algorithms of matrices, and filters are one to Muon.

    Raises:
        HyperparameterError, TargetModulesError, ParameterError, UnsupportedError: As ``build_optimizer``.
    """
    given = None if params is None else listed_groups(params)
    groups = None if given is None else _resolved(given, placed)
    other = _spec_of_rest(spec, rest or Rest(), is_listed=given is not None and not has_patterns(given))
    stacks, convolutions = (stacks_of(model, placed), convolutions_of(model)) if splits_stacks else (set(), set())
    shares = _shares(model, spec, placed, hyperparameters, groups, other, rest or Rest(), stacks)
    others: dict[str, Any] = {
        "no_decay": no_decay,
        "takes_idle": takes_idle and params is not None,
        "stacks": stacks,
    }
    if list(shares) == [spec.name]:
        own = None if groups is None else [group for _, group in shares[spec.name].groups]
        settings = {**others, "target_modules": target_modules}
        arranged, arguments = arrange(model, spec, placed, hyperparameters, params=own, **settings)
        spec = spec.with_arguments(arguments)
    else:
        spec, arranged, arguments = _arranged(model, placed, shares, target_modules, others)
    refuse_sparse_embeddings(model, arranged)
    return spec, in_matrices(spec, arranged, stacks, convolutions), arguments


def _resolved(groups: Sequence[Any], placed: Mapping[str, PlacedParameter]) -> list[Group]:
    """The groups, with parameters in the place of patterns."""
    if has_patterns(groups):
        parameters = {name: one.parameter for name, one in placed.items()}
        groups = by_pattern(groups, parameters, lambda name: _meta(placed[name]))
    return [dict(group) for group in groups]


def _meta(one: PlacedParameter) -> nn.Parameter:
    return meta_parameter(one.shape, one.dtype, one.parameter.requires_grad)


def _shares(
    model: nn.Module,
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    hyperparameters: Mapping[str, Any],
    groups: Sequence[Group] | None,
    other: OptimizerSpec | None,
    rest: Rest,
    stacks: Collection[str],
) -> dict[str, _Share]:
    """What each algorithm steps, by its name, in order of first appearance."""
    values = spec.check(hyperparameters)
    hidden = hidden_matrices(model, placed).union(stacks) if Trait.HIDDEN_MATRICES in spec.traits else set(placed)
    by_id = {id(one.parameter): one for one in placed.values()}
    shares: dict[str, _Share] = {}

    def share_of(wanted: OptimizerSpec) -> _Share:
        found = shares.get(wanted.name)
        if found is None:
            is_rest = other is not None and wanted.name == other.name
            options = _options_of(wanted, hyperparameters, values, rest.options if is_rest else {})
            found = _Share(wanted, dict(hyperparameters) if wanted is spec else options)
            shares[wanted.name] = found
        _refuse_two(found.spec, wanted)
        return found

    def is_left(entry: Any, group: Group) -> bool:
        one = by_id.get(id(_tensor(entry)))
        if one is None:
            return False
        shape = one.shape[1:] if one.fqn in stacks and takes_matrices(spec, {**values, **group}) else one.shape
        refused = spec.driver.why_refused(shape, one.dtype, one.device, {**values, **_values(group)})
        return one.fqn not in hidden or bool(refused)

    everything: list[Group] = [{"params": [one.parameter for one in placed.values()]}]
    for number, group in enumerate(everything if groups is None else groups):
        if OPTIM in group:
            wanted = spec if group[OPTIM] == spec.name else resolve(group[OPTIM])
            _give(share_of(wanted), number, group, is_main=wanted.name == spec.name)
            continue
        left = [] if other is None else [one for one in _entries(group) if is_left(one, group)]
        if other is None or not left or (groups is None and not _has_trained(left, by_id)):
            share_of(spec).add(number, group)
            continue
        ids = {id(one) for one in left}
        if len(left) < len(_entries(group)):
            share_of(spec).add(number, {**group, "params": [one for one in _entries(group) if id(one) not in ids]})
        own = share_of(other)
        own.add(number, {**_said_to_rest(group, rest.options, own), "params": left})
    _refuse_idle_main(spec, shares, by_id, is_given=groups is not None)
    return shares


def _spec_of_rest(spec: OptimizerSpec, rest: Rest, *, is_listed: bool) -> OptimizerSpec | None:
    """What steps the rest; None where nothing does: who lists parameters means the named algorithm for all of them."""
    choice = rest.choice if rest.choice is not None else "" if is_listed else spec.rest
    if not choice:
        if rest.options:
            raise HyperparameterError(
                f"rest_options={dict(rest.options)!r} is for what {spec.name} does not take, and no optimizer is named "
                'for that. Pass rest="adamw_torch", say, or leave rest_options out.'
            )
        return None
    other = resolve(choice)
    if other.name == spec.name:
        raise ParameterError(f"rest={other.name!r} is the optimizer itself. Name another one, or leave rest out.")
    other.check({**{one.name: 1.0 for one in other.records() if one.name == "lr"}, **rest.options})
    return other


def _options_of(
    spec: OptimizerSpec, given: Mapping[str, Any], values: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Hyperparameters of another algorithm than the named one: its rate, the decay that was set, and its own."""
    known = {record.name for record in spec.records()}
    shared = {"lr": values.get("lr")} | ({"weight_decay": given["weight_decay"]} if "weight_decay" in given else {})
    return {**{key: value for key, value in shared.items() if key in known and value is not None}, **own}


def _give(share: _Share, number: int, group: Group, *, is_main: bool) -> None:
    """A group that names its algorithm: what only a constructor takes is taken from there."""
    own = {key: value for key, value in group.items() if key != OPTIM}
    if not is_main:
        lifted = share.known if share.spec.is_undescribed else set(share.spec.in_scope(Scope.CONSTRUCTOR))
        for key in lifted & own.keys():
            value = own[key] if share.spec.is_undescribed else own.pop(key)
            if share.groups and not share.spec.is_undescribed and share.options.get(key, value) != value:
                raise HyperparameterError(
                    f"{share.spec.name} has one value of {key!r} for all of its groups, and group {number} has "
                    f"{value!r}, another one {share.options[key]!r}. Give all of them the same."
                )
            if not share.groups or not share.spec.is_undescribed:
                share.options[key] = value
    share.add(number, own)


def _said_to_rest(group: Group, options: Mapping[str, Any], share: _Share) -> Group:
    """What of a group of the named algorithm is for the rest of its parameters.

    ``rest_options`` go before it, except that what does not decay stays so.
    """
    own = {key: group[key] for key in SHARED if key in group}
    if "weight_decay" in own:
        decays = own["weight_decay"] != 0
        if "weight_decay" in (options if decays else {"weight_decay"} - share.known):
            del own["weight_decay"]
    if "lr" in options and "lr" in own:
        own |= {key: options["lr"] for key in ("lr", "initial_lr") if key in own}
    return own


def _refuse_two(first: OptimizerSpec, second: OptimizerSpec) -> None:
    is_same = first.load_class() is second.load_class() and first.hyperparameters == second.hyperparameters
    if not is_same:
        raise ParameterError(
            f"params: {first.name!r} is asked for by its name and as a class, whose defaults differ, or is the name of "
            "two classes. Write the same in every group."
        )


def _refuse_idle_main(
    spec: OptimizerSpec, shares: Mapping[str, _Share], by_id: Mapping[int, PlacedParameter], *, is_given: bool
) -> None:
    own = shares[spec.name].groups if spec.name in shares else []
    if not any(_has_trained(_entries(group), by_id) for _, group in own) and not (own and is_given):
        others = ", ".join(name for name in shares if name != spec.name)
        raise ParameterError(
            f"{spec.name} would step nothing: {others} steps all parameters that are trained. Name "
            f"{next(iter(shares))!r} itself, or let a group have {spec.name!r} as its {OPTIM!r}."
        )


def _has_trained(entries: Sequence[Any], by_id: Mapping[int, PlacedParameter]) -> bool:
    found = (by_id.get(id(_tensor(one))) for one in entries)
    return any(one is None or one.is_trained for one in found)


def _entries(group: Group) -> list[Any]:
    given = group["params"]
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def _values(group: Group) -> Group:
    return {key: value for key, value in group.items() if key != "params"}


def _arranged(
    model: nn.Module,
    placed: Mapping[str, PlacedParameter],
    shares: Mapping[str, _Share],
    target_modules: str | Sequence[str] | None,
    others: Mapping[str, Any],
) -> tuple[OptimizerSpec, list[ParamGroup], dict[str, Any]]:
    """The groups of all shares, in the user's order."""
    number_of: dict[int, int] = {}
    arranged: list[ParamGroup] = []
    arguments: dict[str, Any] = {}
    low_rank = [name for name, share in shares.items() if Trait.LOW_RANK in share.spec.traits]
    for name, share in shares.items():
        _refuse_fused(share.spec)
        number_of |= {id(_tensor(one)): number for number, group in share.groups for one in _entries(group)}
        targets = target_modules if name in (low_rank or [next(iter(shares))]) else None
        own = [group for _, group in share.groups]
        groups, arguments[name] = arrange(
            model, share.spec, placed, share.options, params=own, target_modules=targets, **others
        )
        arranged += [{**group, OPTIM: name} for group in groups]
    arranged.sort(key=lambda group: number_of[id(group["params"][0].parameter)])
    specs = {name: shares[name].spec.with_arguments(arguments[name]) for name in (group[OPTIM] for group in arranged)}
    return composed_spec(specs, [group[OPTIM] for group in arranged]), arranged, arguments


def _refuse_fused(spec: OptimizerSpec) -> None:
    if Trait.FUSED_BACKWARD in spec.traits:
        raise UnsupportedError(
            f"{spec.name} is made to step inside backward, and cannot share a model with another optimizer. Use "
            f"{spec.instead or 'it alone, or another algorithm'}."
        )
