"""``build_optimizer``: from a placed model and a name to a ``DistributedOptimizer``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dist_optim.building.targets import select_matrices
from dist_optim.errors import DistOptimError, HyperparameterError, ParameterError, TargetModulesError, UnsupportedError
from dist_optim.exchange.ddp_hook import find_ddp
from dist_optim.inside_backward.guards import why_not_fused
from dist_optim.inside_backward.handle import install
from dist_optim.layouts.detect import PlacedParameter, detect, reshard
from dist_optim.ranks.agreement import num_ranks, own_rank, raise_together, reachable_devices
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.hyperparameters import Scope, check_hyperparameters
from dist_optim.specs.registry import OptimizerSpec, Trait, get_spec, names, spec_of_class
from dist_optim.stepping.audit import route_audit
from dist_optim.stepping.optimizer import DEFAULT_BUCKET_BYTES, DistributedOptimizer
from dist_optim.stepping.parameter_guard import ModelWatch
from dist_optim.stepping.probe import prove_separable

__all__ = ["arrange", "build_optimizer", "resolve"]

ONE_BUCKET = 1 << 62


def build_optimizer(
    model: nn.Module,
    optimizer: str | type[Optimizer],
    *,
    target_modules: str | Sequence[str] | None = None,
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    no_decay: Iterable[str] = (),
    process_group: dist.ProcessGroup | None = None,
    resident_parameters: bool = False,
    reduce_to_owner: bool = False,
    fused_backward: bool | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    check_ranks_every: int = 0,
    print_audit: bool = True,
    **hyperparameters: Any,
) -> DistributedOptimizer:
    """Build an optimizer on a model that is already on its device and wrapped by its engine.

    Collective: every rank of ``process_group`` calls it with the same arguments. A mistake raises on all ranks
    together, before anything is trained. Rank 0 prints the route audit: which algorithm got which tensors.

    Args:
        model: The model as it will be trained (plain, DistributedDataParallel, or sharded by fully_shard).
        optimizer: A registered name (``dist_optim.names()``), or an optimizer class.
        target_modules: For low-rank optimizers, which linear layers are trained in a low-rank space: ``"all-linear"``,
            or parts of module names, or regular expressions. Their weights go into param groups of their own, after
            the others, as transformers' Trainer arranges them.
        params: Parameters, or param groups with hyperparameters of their own, instead of all of the model's. A group
            that names ``rank`` itself is low-rank as it stands.
        no_decay: Names of parameters that get ``weight_decay=0``, in a group of their own.
        process_group: The ranks that train the model together; the default group when None.
        resident_parameters: Owners keep full copies of what they own, in sharded layouts: a third less traffic.
        reduce_to_owner: Under DistributedDataParallel, reduce each gradient to its owner only, in place of the
            all-reduce: gradients and updated parameters together then cost the traffic of one all-reduce. Clip with
            ``optimizer.clip_grad_norm_``.
        fused_backward: Update each parameter inside backward, as soon as its reduced gradient is there, and free the
            gradient (``dist_optim.inside_backward.handle``); for elementwise optimizers, ``lomo``, ``adalomo`` and layerwise
            names. None: ``lomo`` and ``adalomo`` do so wherever it is served, and layerwise names always.
        bucket_bytes: Bytes of parameters that one owner takes in one round of the exchange; with a fused backward,
            bytes of gradients that wait for each other.
        check_ranks_every: Every so many steps ranks compare fingerprints of all that they should hold alike (rates,
            counters, replicated parameters, state of replicas), and raise with the first difference; 0 for never.
        print_audit: Whether rank 0 prints the route audit.
        **hyperparameters: ``lr``, ``weight_decay``, and everything else under upstream's own names.

    Raises:
        UnknownOptimizerError, HyperparameterError, TargetModulesError, MissingPackageError, ParameterError,
        UnsupportedError: See ``dist_optim.errors``; on all ranks together.
        RanksDisagreeError: Ranks gave different models or arguments.
    """
    error: DistOptimError | None = None
    built: DistributedOptimizer | None = None
    ddp: DistributedDataParallel | None = None
    try:
        ddp = find_ddp(model) if reduce_to_owner and num_ranks(process_group) > 1 else None
        spec = resolve(optimizer, inside_backward=fused_backward is not False)
        placed = detect(model, process_group)
        alternative = "reduce_to_owner" if reduce_to_owner else "resident_parameters" if resident_parameters else ""
        is_fused = _choose_fused(fused_backward, alternative, model, spec, placed, process_group)
        groups, arguments = arrange(
            model,
            spec,
            placed,
            hyperparameters,
            params=params,
            no_decay=no_decay,
            target_modules=target_modules,
        )
        if spec.is_undescribed and num_ranks(process_group) > 1:
            spec = prove_separable(spec, groups, arguments)
        built = DistributedOptimizer(
            spec,
            groups,
            arguments,
            process_group=_one_process_group(placed.values(), process_group),
            resident_parameters=resident_parameters,
            # Inside backward, what travels together is what was ready together: the plan only names owners.
            bucket_bytes=ONE_BUCKET if is_fused else bucket_bytes,
            check_ranks_every=check_ranks_every,
            all_ranks=process_group,
            reshard=partial(reshard, model),
        )
    except DistOptimError as caught:
        error = caught
    raise_together(error, process_group)
    assert built is not None
    built.agree_on_plan()
    if ddp is not None:
        built.reduce_to_owners(ddp)
    if is_fused:
        install(built, model, bucket_bytes=bucket_bytes)
    built.register_step_pre_hook(ModelWatch(model, built.placed_parameters(), process_group))
    if print_audit and own_rank(built.process_group) == 0:
        print(route_audit(built), flush=True)
    return built


def _choose_fused(
    asked: bool | None,
    alternative: str,
    model: nn.Module,
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    process_group: dist.ProcessGroup | None,
) -> bool:
    """Whether to step inside backward: as asked; else where the optimizer is made for it and it is served.

    Raises:
        UnsupportedError: It was asked for, or is the only way of this name, and is not served here.
    """
    if asked is False or (asked is None and Trait.FUSED_BACKWARD not in spec.traits):
        return False
    reason = why_not_fused(model, spec, placed, process_group)
    if alternative:
        reason = f"{alternative}=True works on stored gradients. Leave it out."
    if not reason or (asked is None and not spec.instead):
        return not reason
    hint = f" Or use {spec.instead}, the same algorithm with stored gradients." if spec.instead else ""
    raise UnsupportedError(f"{spec.name} cannot step inside backward here: {reason}{hint}")


def resolve(optimizer: str | type[Optimizer], *, inside_backward: bool = False) -> OptimizerSpec:
    """The spec of a name or a class, with its package at hand.

    Args:
        optimizer: What the user chose.
        inside_backward: Whether the caller can step inside backward, as layerwise names always do.

    Raises:
        UnknownOptimizerError, MissingPackageError, UnsupportedError: It cannot be used.
        ParameterError: It is something else; an optimizer that is built already, most often.
    """
    if isinstance(optimizer, str):
        spec = get_spec(optimizer)
    elif isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        spec = spec_of_class(optimizer)
    else:
        raise ParameterError(_why_no_choice(optimizer))
    if spec.refusal:
        raise UnsupportedError(f"{spec.name}: {spec.refusal}")
    if spec.instead and not inside_backward:
        raise UnsupportedError(
            f"{spec.name} steps each parameter inside backward, which is not served here. Use {spec.instead}, the same "
            "algorithm with stored gradients."
        )
    spec.load_class()
    return spec


def _why_no_choice(given: object) -> str:
    if not isinstance(given, Optimizer):
        return (
            f"optimizer={given!r} is neither a registered name nor a subclass of torch.optim.Optimizer. "
            "Pass one of dist_optim.names(), or the class itself."
        )
    name = given.spec.name if isinstance(given, DistributedOptimizer) else spec_of_class(type(given)).name
    wanted = repr(name) if name in names() else type(given).__name__
    return (
        f"optimizer is an instance of {type(given).__name__}, built already, on parameters that wrapping the model may "
        f"replace. Pass what to build instead, and its hyperparameters: {wanted}, lr=..., ... It is built when the "
        "model is in place."
    )


def arrange(
    model: nn.Module,
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    hyperparameters: Mapping[str, Any],
    *,
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    no_decay: Iterable[str] = (),
    target_modules: str | Sequence[str] | None = None,
) -> tuple[list[ParamGroup], dict[str, Any]]:
    """Param groups of placed parameters, and upstream's constructor keywords; all values checked.

    Raises:
        HyperparameterError, TargetModulesError, ParameterError: As ``build_optimizer``.
    """
    values = spec.check(hyperparameters)
    groups = _make_groups(model, spec, values, placed, params, set(no_decay), target_modules)
    groups = _with_special_values(groups, model, spec, hyperparameters)
    arguments = {key: values[key] for key in values if key not in spec.in_scope(Scope.MATRIX)}
    return groups, {**arguments, **spec.forced}


def _make_groups(
    model: nn.Module,
    spec: OptimizerSpec,
    values: Mapping[str, Any],
    placed: Mapping[str, PlacedParameter],
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None,
    no_decay: set[str],
    target_modules: str | Sequence[str] | None,
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
    targets = set(select_matrices(model, target_modules, spec.name))
    halves = [_split(group, targets, matrix_values) for group in groups]
    arranged = [rest for rest, _ in halves] + [low_rank for _, low_rank in halves]
    arranged = [group for group in arranged if group["params"]]
    trained = [p for group in arranged if "rank" in group for p in group["params"] if p.parameter.requires_grad]
    if not trained:
        raise TargetModulesError(
            f"target_modules={target_modules!r} selects only layers that are frozen or outside `params`, so "
            f"{spec.name} would own nothing. Select layers that are trained."
        )
    return arranged


def _with_special_values(
    groups: list[ParamGroup], model: nn.Module, spec: OptimizerSpec, given: Mapping[str, Any]
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
    for parameter_id, own in spec.driver.values_by_parameter(model).items():
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


def _given_groups(
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None,
) -> list[ParamGroup]:
    if params is None:
        return [{"params": list(placed.values())}]
    listed: list[Any] = list(params)
    given = listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
    by_id = {id(p.parameter): p for p in placed.values()}
    seen: set[int] = set()
    groups: list[ParamGroup] = []
    for number, group in enumerate(given):
        members = group["params"] if isinstance(group, Mapping) and "params" in group else None
        if members is None:
            raise ParameterError(f"params: group {number} is {group!r:.80}, not a dict with the key 'params'.")
        members = [members] if isinstance(members, Tensor) else list(members)
        for at, parameter in enumerate(members):
            if id(parameter) not in by_id:
                raise ParameterError(
                    f"params: parameter {at} of group {number} (shape {tuple(getattr(parameter, 'shape', ()))}) is not "
                    "a parameter of the model. Wrapping or sharding a model can replace its parameters: build the "
                    "groups from the wrapped model, and the optimizer last."
                )
            if id(parameter) in seen:
                raise ParameterError(f"params: {by_id[id(parameter)].fqn!r} is listed twice. List it in one group.")
            seen.add(id(parameter))
        own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**_check_group(spec, own), "params": [by_id[id(parameter)] for parameter in members]})
    if not seen:
        raise ParameterError("params is empty: there is nothing to optimize. Pass the model's parameters.")
    return groups


def _check_group(spec: OptimizerSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    if spec.hyperparameters is None:
        return dict(values)
    fixed = [key for key in values if key in spec.in_scope(Scope.CONSTRUCTOR)]
    if fixed:
        raise HyperparameterError(
            f"{spec.name} has one value of {fixed[0]!r} for all groups. "
            "Pass it to build_optimizer itself, not in a group."
        )
    return check_hyperparameters(spec.name, spec.hyperparameters, values)


def _split(group: ParamGroup, names: set[str], chosen: Mapping[str, Any]) -> tuple[ParamGroup, ParamGroup]:
    """The group without the named parameters, and the group of the named ones, which gets the ``chosen`` values."""
    inside = [placed for placed in group["params"] if placed.fqn in names]
    outside = [placed for placed in group["params"] if placed.fqn not in names]
    return {**group, "params": outside}, {**group, **chosen, "params": inside}


def _one_process_group(
    placed: Iterable[PlacedParameter], process_group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The group that all ranks of the plan share: the shard group of the sharded parameters, where there are any."""
    sharded = [p for p in placed if not p.layout.is_replicated]
    # By their ranks: of two equal device meshes torch's caches may hand out either, so that the parameters of one model
    # can name different groups of the same ranks.
    groups = {tuple(dist.get_process_group_ranks(p.process_group)): p.process_group for p in reversed(sharded)}
    if len(groups) > 1:
        raise UnsupportedError(
            "Parameters are sharded over different process groups. Shard the model over one mesh axis, or build one "
            "optimizer for each part with params=."
        )
    group = next(iter(groups.values()), process_group)
    _refuse_unreachable_devices(placed, group)
    return group


def _refuse_unreachable_devices(placed: Iterable[PlacedParameter], group: dist.ProcessGroup | None) -> None:
    """Parameters that are offloaded to the CPU need a process group that communicates there."""
    if num_ranks(group) == 1:
        return
    served = reachable_devices(group)
    for one in placed:
        if one.device.type not in served:
            raise UnsupportedError(
                f"{one.fqn!r} is on {one.device.type}, where the process group has no backend (it serves "
                f"{', '.join(sorted(served))}). Start it with a backend for each device: "
                "torch.distributed.init_process_group('cpu:gloo,cuda:nccl')."
            )
