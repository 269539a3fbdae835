"""``build_optimizer``: from a placed model and a name to a ``DistributedOptimizer``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dist_optim.building.alike import assert_alike
from dist_optim.building.arguments import check_model, check_process_group, check_settings
from dist_optim.building.choice import refuse_combination, refuse_inside_backward, resolve
from dist_optim.building.composing import Rest, compose
from dist_optim.building.groups import GivenParameters
from dist_optim.building.new_groups import NewGroups
from dist_optim.building.stacks import coverage, coverage_line, refuse_low_coverage, stacks_of
from dist_optim.building.verdicts import with_verdict
from dist_optim.errors import UnsupportedError
from dist_optim.inside_backward.guards import why_not_fused
from dist_optim.inside_backward.handle import install
from dist_optim.inside_backward.to_owners import send_to_owners, stop_sending
from dist_optim.layouts.detect import PlacedParameter, detect, ranks_to_meet
from dist_optim.ranks.agreement import (
    assert_same_ranks_meant,
    group_of_ranks,
    host_group,
    num_ranks,
    own_rank,
    reachable_devices,
)
from dist_optim.ranks.first_meeting import meet_first
from dist_optim.ranks.liveness import watch_ranks
from dist_optim.ranks.together import together
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping.division import divide, starting_values
from dist_optim.stepping.nonfinite import check_choice
from dist_optim.stepping.optimizer import DEFAULT_BUCKET_BYTES, DistributedOptimizer
from dist_optim.stepping.parameter_guard import ParameterGuard
from dist_optim.verifying.shadow import VerifiedSteps, refuse_closures

__all__ = ["build_optimizer"]

ONE_BUCKET = 1 << 62


def build_optimizer(
    model: nn.Module,
    optimizer: str | type[Optimizer],
    *,
    target_modules: str | Sequence[str] | None = None,
    params: GivenParameters = None,
    no_decay: Iterable[str] = (),
    rest: str | type[Optimizer] | None = None,
    rest_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    fused_backward: bool | None = None,
    reduce_to_owner: bool = False,
    replicate: str | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    check_ranks_every: int = 0,
    on_nonfinite: str | None = None,
    rank_timeout_s: float | None = None,
    independent: bool | None = None,
    master_weights: bool = False,
    verify_steps: int = 0,
    min_coverage: float | None = None,
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
        params: Parameters, or named ones, or param groups with hyperparameters of their own, instead of all of the
            model's. A group that names ``rank`` itself is low-rank as it stands. Frozen parameters that are listed are
            stepped once they are unfrozen, and have no state before. A group may be given by patterns of names
            (``building.patterns``), may name an algorithm of its own, and a rate relative to ``lr``:
            ``{"params": "layers.*.weight", "optim": "muon", "lr_scale": 0.5}``; the first pattern that matches takes a
            parameter, and what is trained has to be in some group (``{"params": "*"}`` takes all that is left).
        no_decay: Names of parameters that get ``weight_decay=0``, in a group of their own.
        rest: What steps the parameters that the optimizer does not take: those that upstream refuses, and for ``muon``
            all but hidden matrices (``building.hidden_matrices``: embeddings, the output head and vectors are rest).
            None: ``adamw_torch`` for ``muon``, unless ``params`` lists parameters themselves; else they are refused.
            Groups that name an algorithm leave no rest. The reference is the separate upstream optimizers, stepped in
            one process.
        rest_options: Hyperparameters of ``rest``. Where they say nothing, it has the same ``lr``, the ``weight_decay``
            that you set, and its own defaults for all else; parameters without decay stay so.
        process_group: The ranks that train the model together; the default group when None.
        fused_backward: Update each parameter inside backward, as soon as its reduced gradient is there, and free the
            gradient (``dist_optim.inside_backward``); for elementwise optimizers, ``lomo``, ``adalomo`` and layerwise
            names. None: ``lomo`` and ``adalomo`` do so wherever it is served, and layerwise names always.
        reduce_to_owner: Under FSDP2 (fully_shard) and DistributedDataParallel, let backward send the gradients of
            tensors that are stepped whole to their owners, in place of its own reduction of them, so that they do not
            travel again in ``step``; nor do the parameters, where they are stored in the dtype in which layers compute.
            ``parameter.grad`` of such a tensor then has no values (``stepping.at_owner``): clip by
            ``optimizer.clip_grad_norm_``. An owner keeps room for its gradients and parameters. Elsewhere gradients
            travel in ``step`` as they do without it, and the route audit says so.
        replicate: ``"elementwise"``: what every rank holds whole (DistributedDataParallel), and an elementwise
            optimizer steps, is stepped by every rank alike, as a stock optimizer does it: no parameter travels, and
            each rank holds all of its state. None: one rank steps each tensor, and has its state.
        bucket_bytes: The most that a rank's buffer for the gradients, or for the parameters, of one round of the
            exchange takes, at any number of ranks (a larger tensor travels alone); with a fused backward, bytes of
            gradients that wait for each other.
        check_ranks_every: Every so many steps ranks compare fingerprints of all that they should hold alike (rates,
            counters, replicated parameters, state of replicas), and raise with the first difference; 0 for never.
        on_nonfinite: What is done where a gradient is infinite or NaN on any rank: "raise" (all ranks raise in that
            step, and nothing is changed), "skip" (no rank takes that step; ``num_skipped_steps`` counts, and rank 0
            logs it), or None: it is given to upstream, as in one process. Costs one wait for the gradients a step.
        rank_timeout_s: Seconds after which a rank that is stopped or cut off is given up, and the others end with its
            name (``ranks.liveness``); None for DIST_OPTIM_RANK_TIMEOUT_S of the environment, or 120; 0 for no watch.
        independent: Of a class without a name here: whether each of its tensors is stepped by itself, so that ranks may
            share them. None: proven at start-up (``dist_optim.testing.prove``); where it cannot be, rank 0 steps all of
            them, which is exact, and not sharded. True is the user's word for it, and nothing is tried or watched;
            False lets rank 0 step all of them.
        master_weights: Whether upstream steps fp32 copies of the parameters that the model holds in bfloat16 or
            float16, which lose updates far smaller than themselves. They live with the rank that steps them, sharded
            like its state, and in checkpoints; the trajectory is that of upstream on fp32 copies, given the gradients
            in fp32. DeepSpeed has masters of its own.
        verify_steps: So many of the first steps are stepped a second time, by the unmodified upstream optimizer on rank
            0 from the same gradients, and compared to the bit; rank 0 prints one line. It has the whole model once more
            until then, with its state. From stored gradients alone, and in runs that start without state.
        min_coverage: The least share, from 0 to 1, of the trained elements that a low-rank optimizer must take as
            matrices, or ``muon`` as hidden ones. A stack of experts ``[E, m, n]``, of a module that is named so, is E
            matrices to them. None: the audit warns where it is under a half.
        print_audit: Whether rank 0 prints the route audit.
        **hyperparameters: ``lr``, ``weight_decay``, and everything else under upstream's own names.

    Raises:
        UnknownOptimizerError, HyperparameterError, TargetModulesError, MissingPackageError, ParameterError,
        UnsupportedError: See ``dist_optim.errors``; on all ranks together.
        RanksDisagreeError: Ranks gave different models or arguments, or run different versions of a library; or some
            ranks do not call it (said on stderr after seconds where nothing can be raised yet).
    """
    check_process_group(process_group)
    meet_first("build_optimizer()", process_group)
    host_group(process_group)  # where one has to be made, all ranks make it now, before any of them can fail
    doing = "Building the optimizer"
    remedy = "Check the arguments of build_optimizer; the error that this one comes from says where it happened."

    def look() -> tuple[int, ...]:
        check_model(model)
        return ranks_to_meet(model, process_group)

    ranks = together(look, process_group, doing=doing, remedy=remedy)
    assert_same_ranks_meant(ranks, process_group)
    if ranks:
        group_of_ranks(ranks)  # again before any of them can fail

    def prepare() -> _Prepared:
        check_settings(
            bucket_bytes=bucket_bytes,
            check_ranks_every=check_ranks_every,
            fused_backward=fused_backward,
            reduce_to_owner=reduce_to_owner,
            print_audit=print_audit,
            independent=independent,
            master_weights=master_weights,
            replicate=replicate,
            verify_steps=verify_steps,
            min_coverage=min_coverage,
        )
        check_choice(on_nonfinite)
        spec = named = resolve(optimizer, inside_backward=fused_backward is not False)
        placed = detect(model, process_group)
        is_fused = _choose_fused(fused_backward, model, spec, placed, process_group)
        if is_fused:
            placed = detect(model, process_group, shares_replicas=False)
        if is_fused:
            refuse_inside_backward(spec, on_nonfinite, master_weights, verify_steps)
        spec, groups, arguments = compose(
            model,
            spec,
            placed,
            hyperparameters,
            params=params,
            no_decay=no_decay,
            target_modules=target_modules,
            rest=Rest(rest, rest_options or {}),
            splits_stacks=not is_fused,
        )
        share = coverage(named, spec, groups)
        refuse_low_coverage(named.name, share, min_coverage)
        refuse_combination(spec, is_fused=is_fused)
        # Inside backward, what travels together is what was ready together: the plan only names owners.
        return _Prepared(
            spec,
            groups,
            arguments,
            is_fused,
            _one_process_group(placed.values(), process_group),
            ONE_BUCKET if is_fused else bucket_bytes,
            coverage_line(named.name, share, stacks_of(model, placed) if is_fused else ()),
        )

    prepared = together(prepare, process_group, doing=doing, remedy=remedy)
    settings = {
        "fused_backward": prepared.is_fused,
        "reduce_to_owner": reduce_to_owner,
        "replicate": replicate,
        "bucket_bytes": bucket_bytes,
        "check_ranks_every": check_ranks_every,
        "independent": independent,
        "master_weights": master_weights,
        "verify_steps": verify_steps,
        "min_coverage": min_coverage,
    }
    asked = {"optimizer": prepared.spec.name, **settings, "target_modules": target_modules, **hyperparameters}
    asked |= {"rest": rest, "rest_options": rest_options}
    asked |= {f"the group of {one.fqn!r}": at for at, group in enumerate(prepared.groups) for one in group["params"]}
    assert_alike(asked, process_group, prepared.spec.packages)
    spec = with_verdict(prepared.spec, prepared.groups, prepared.arguments, process_group, independent)
    if verify_steps:
        refuse_closures(spec)
    division = together(
        lambda: divide(
            spec,
            prepared.groups,
            prepared.arguments,
            process_group=prepared.process_group,
            all_ranks=process_group,
            bucket_bytes=prepared.bucket_bytes,
            master_weights=master_weights,
            replicates=replicate == "elementwise",
            by_stored_gradients=not prepared.is_fused,
        ),
        process_group,
        doing=doing,
        remedy=remedy,
    )
    division.agree()
    watch_ranks(process_group, rank_timeout_s)
    values = starting_values(division)
    built = together(
        lambda: DistributedOptimizer(
            division,
            values,
            check_ranks_every=check_ranks_every,
            on_nonfinite=on_nonfinite,
            model_side=ParameterGuard(model, division.placed),
        ),
        process_group,
        doing=doing,
        remedy=remedy,
    )
    built.coverage = prepared.coverage
    built.share_groups()
    built.new_groups = NewGroups(model, hyperparameters, process_group)
    if prepared.is_fused:
        together(lambda: install(built, model, bucket_bytes=bucket_bytes), process_group)
    stop_sending(model)
    if reduce_to_owner and not prepared.is_fused:
        built.route_of_gradients = together(lambda: send_to_owners(built, model), process_group)
    if verify_steps:
        built.verified_steps = VerifiedSteps([built], verify_steps, built.free_gathered_copies)
    if print_audit and own_rank(process_group) == 0:
        print(built.route_audit(), flush=True)
    return built


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What the arguments say, checked."""

    spec: OptimizerSpec
    groups: list[ParamGroup]
    arguments: dict[str, Any]
    is_fused: bool
    process_group: dist.ProcessGroup | None
    """The ranks that share the work."""
    bucket_bytes: int
    coverage: str | None
    """For the audit."""


def _choose_fused(
    asked: bool | None,
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
    if not reason or (asked is None and not spec.instead):
        return not reason
    hint = f" Or use {spec.instead}, the same algorithm with stored gradients." if spec.instead else ""
    raise UnsupportedError(f"{spec.name} cannot step inside backward here: {reason}{hint}")


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
