"""Param groups of placed parameters, with checked values: as given, by weight decay, by low rank, for embeddings."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.building.arguments import listed_names
from dist_optim.building.targets import select_matrices
from dist_optim.errors import HyperparameterError, ParameterError, TargetModulesError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.hyperparameters import Hyperparameter, Scope, check_hyperparameters
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["KEYS_OF_TORCH", "GivenParameters", "arrange", "listed_groups"]

GivenParameters = Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]] | Iterable[Mapping[str, Any]] | None
KEYS_OF_TORCH = ("initial_lr",)
"""What torch's own schedules write into param groups, and read when they are made again in the middle of a run."""

STEPPED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def arrange(
    model: nn.Module,
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    hyperparameters: Mapping[str, Any],
    *,
    params: GivenParameters = None,
    no_decay: Iterable[str] = (),
    target_modules: str | Sequence[str] | None = None,
    takes_idle: bool = True,
    stacks: Collection[str] = (),
) -> tuple[list[ParamGroup], dict[str, Any]]:
    """Param groups of placed parameters, and upstream's constructor keywords; all values checked.

    What is named in ``stacks`` is selected by ``target_modules`` as linear layers are.

    Frozen parameters that ``params`` lists are *idle*, where the optimizer could step them and ``takes_idle``: they are
    stepped once they have a gradient. All other frozen ones only keep their positions.

    Raises:
        HyperparameterError, TargetModulesError, ParameterError: As ``build_optimizer``.
    """
    values = spec.check(hyperparameters)
    undecayed = _known_names(no_decay, placed)
    groups = _make_groups(model, spec, values, placed, params, undecayed, target_modules, stacks)
    names = {id(one.parameter): one.fqn for one in placed.values()}
    groups = _with_special_values(groups, model, names, spec, hyperparameters)
    arguments = {key: values[key] for key in values if key not in spec.in_scope(Scope.MATRIX)}
    arguments = {**arguments, **spec.forced}
    if params is not None and takes_idle:
        groups = [{**group, "params": _with_idle(spec, group, arguments)} for group in groups]
    return groups, arguments


def _with_idle(spec: OptimizerSpec, group: ParamGroup, arguments: Mapping[str, Any]) -> list[PlacedParameter]:
    """The members of a group that was given, with what is frozen for now marked so."""
    values = {**arguments, **{key: value for key, value in group.items() if key != "params"}}

    def is_idle(one: PlacedParameter) -> bool:
        # Quantized weights, also those behind a tensor class that shows another dtype, are no parameters to be stepped.
        is_plain = type(one.local()) in (Tensor, nn.Parameter) and one.dtype in STEPPED_DTYPES
        return (
            is_plain
            and not one.is_trained
            and not spec.driver.why_refused(one.shape, one.dtype, one.device, values)
            and not spec.driver.why_not_divided(one.dtype, values)
        )

    return [replace(one, is_trained=True, is_idle=True) if is_idle(one) else one for one in group["params"]]


def _make_groups(
    model: nn.Module,
    spec: OptimizerSpec,
    values: Mapping[str, Any],
    placed: Mapping[str, PlacedParameter],
    params: GivenParameters,
    no_decay: set[str],
    target_modules: str | Sequence[str] | None,
    stacks: Collection[str],
) -> list[ParamGroup]:
    """Param groups with checked values, ``params`` as placed parameters; low-rank groups after the others."""
    groups = _given_groups(spec, placed, params)
    groups = [part for group in groups for part in _split(group, no_decay, {"weight_decay": 0.0}) if part["params"]]
    if Trait.LOW_RANK not in spec.traits:
        if target_modules is not None:
            raise TargetModulesError(
                f"{spec.name} has no low-rank matrices to select: leave target_modules out, or choose an optimizer "
                "that takes it (galore_adamw, for example)."
            )
        return groups
    matrix_values = {key: values[key] for key in spec.in_scope(Scope.MATRIX)}
    if target_modules is None and any("rank" in group for group in groups):
        return [{**matrix_values, **group} if "rank" in group else group for group in groups]
    targets = set(select_matrices(model, target_modules, spec.name, stacks))
    halves = [_split(group, targets, matrix_values) for group in groups]
    arranged = [rest for rest, _ in halves] + [low_rank for _, low_rank in halves]
    arranged = [group for group in arranged if group["params"]]
    trained = [p for group in arranged if "rank" in group for p in group["params"] if p.is_trained]
    if not trained:
        raise TargetModulesError(
            f"target_modules={target_modules!r} selects only layers that are frozen or outside `params`, so "
            f"{spec.name} would own nothing. Select layers that are trained."
        )
    return arranged


def _with_special_values(
    groups: list[ParamGroup],
    model: nn.Module,
    names: Mapping[int, str],
    spec: OptimizerSpec,
    given: Mapping[str, Any],
) -> list[ParamGroup]:
    """Defaults that differ for matrices and embeddings, and what the user set by upstream's own means."""
    for_matrices, for_embeddings = (
        {key: value for key, value in defaults.items() if key not in given}
        for defaults in (spec.matrix_defaults, spec.embedding_defaults)
    )
    groups = [{**for_matrices, **group} if "rank" in group else group for group in groups]
    if for_embeddings:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        groups = _split_all(groups, embeddings, for_embeddings, overrule=False)
    for parameter_id, own in spec.driver.values_by_parameter(model, names).items():
        groups = _split_all(groups, {parameter_id}, check_hyperparameters(spec.name, spec.records(), own))
    return groups


def _split_all(
    groups: Iterable[ParamGroup], parameter_ids: set[int], chosen: Mapping[str, Any], overrule: bool = True
) -> list[ParamGroup]:
    """Split every group; the parts that get the ``chosen`` values follow their group, empty parts are left out."""
    parts: list[ParamGroup] = []
    for group in groups:
        names = {placed.fqn for placed in group["params"] if id(placed.parameter) in parameter_ids}
        own = chosen if overrule else {key: value for key, value in chosen.items() if key not in group}
        parts += _split(group, names, own)
    return [part for part in parts if part["params"]]


def _known_names(no_decay: Iterable[str], placed: Mapping[str, PlacedParameter]) -> set[str]:
    """The names in ``no_decay``, each of which is a parameter's."""
    names = listed_names("no_decay", () if no_decay is None else no_decay)
    for name in names:
        if name not in placed:
            near = difflib.get_close_matches(name, list(placed), n=3, cutoff=0.3)
            hint = f" The nearest are: {', '.join(near)}." if near else ""
            raise ParameterError(
                f"no_decay names {name!r}, which is no parameter of the model.{hint} Names are whole, as "
                "model.named_parameters() of the model without wrappers gives them."
            )
    return set(names)


def _given_groups(
    spec: OptimizerSpec, placed: Mapping[str, PlacedParameter], params: GivenParameters
) -> list[ParamGroup]:
    if params is None:
        return [{"params": list(placed.values())}]
    by_id = {id(p.parameter): p for p in placed.values()}
    seen: set[int] = set()
    groups: list[ParamGroup] = []
    for number, group in enumerate(listed_groups(params)):
        members = [_member(at, number, given, by_id) for at, given in enumerate(_listed("params", group["params"]))]
        for one in members:
            if id(one.parameter) in seen:
                raise ParameterError(f"params: {one.fqn!r} is listed twice. List it in one group.")
            seen.add(id(one.parameter))
        own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        # Upstream gets names where it would have them: what they are is found again for each instance.
        is_named = spec.is_undescribed and ("param_names" in group or _are_named(group["params"]))
        marks = {"param_names": [one.fqn for one in members]} if is_named else {}
        groups.append({**_check_group(spec, own), "params": members, **marks})
    if not seen:
        raise ParameterError("params is empty: there is nothing to optimize. Pass the model's parameters.")
    return groups


def _are_named(params: Any) -> bool:
    return isinstance(params, (list, tuple)) and bool(params) and isinstance(params[0], tuple)


def listed_groups(params: Any) -> list[Mapping[str, Any]]:
    """What was given, as groups: each a dict with the key ``params``."""
    listed = _listed("params", params)
    given: list[Any] = listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
    for number, group in enumerate(given):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ParameterError(f"params: group {number} is {group!r:.80}, not a dict with the key 'params'.")
    return given


def _listed(what: str, given: Any) -> list[Any]:
    """Parameters in the order given; one tensor is a list of one."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, (set, frozenset)):
        raise ParameterError(f"{what} is a set, whose order can differ between ranks. Pass a list.")
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ParameterError(
            f"{what}={given!r:.80} is no list of parameters. Pass the model's parameters, or a list of groups "
            "({'params': [...], 'lr': ...}); leave params out for all of the model's."
        )
    return list(given)


def _member(at: int, group: int, given: Any, by_id: Mapping[int, PlacedParameter]) -> PlacedParameter:
    """The placed parameter that was given, as it is or with a name, as ``named_parameters()`` does."""
    parameter = given[1] if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) else given
    if id(parameter) in by_id:
        return by_id[id(parameter)]
    if not isinstance(parameter, Tensor):
        raise ParameterError(
            f"params: entry {at} of group {group} is {parameter!r:.80}, which is no parameter. Pass the model's "
            "parameters themselves."
        )
    raise ParameterError(
        f"params: parameter {at} of group {group} (shape {tuple(parameter.shape)}) is not a parameter of the model. "
        "Wrapping or sharding a model can replace its parameters: build the groups from the wrapped model, and the "
        "optimizer last."
    )


def _check_group(spec: OptimizerSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    of_torch = {key: given[key] for key in KEYS_OF_TORCH if key in given}
    values = {key: value for key, value in given.items() if key not in of_torch}
    if spec.hyperparameters is None:  # a class may read keys of its groups that its constructor does not name
        unnamed = {key: Hyperparameter(name=str(key), kind="any", default=None, meaning="in a group") for key in values}
        known = {**unnamed, **{record.name: record for record in spec.records()}}
        return {**{key: known[key].check(value, spec.name) for key, value in values.items()}, **of_torch}
    fixed = [key for key in values if key in spec.in_scope(Scope.CONSTRUCTOR)]
    if fixed:
        raise HyperparameterError(
            f"{spec.name} has one value of {fixed[0]!r} for all groups. "
            "Pass it to build_optimizer itself, not in a group."
        )
    return {**check_hyperparameters(spec.name, spec.hyperparameters, values), **of_torch}


def _split(group: ParamGroup, names: set[str], chosen: Mapping[str, Any]) -> tuple[ParamGroup, ParamGroup]:
    """The group without the named parameters, and the group of the named ones, which gets the ``chosen`` values."""
    inside = [placed for placed in group["params"] if placed.fqn in names]
    outside = [placed for placed in group["params"] if placed.fqn not in names]
    return {**group, "params": outside}, {**group, **chosen, "params": inside}
