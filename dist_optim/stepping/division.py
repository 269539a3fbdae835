"""Who steps what: which parameters run on local slices, and who owns the others; before anything of upstream exists."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_optim.exchange.plan import Plan
from dist_optim.exchange.routing import plan_owners, refuse_misfits, runs_on_local_slices
from dist_optim.exchange.tasks import Task, run_tasks
from dist_optim.exchange.transfer import gather_to_owner
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.detect_fsdp1 import is_marked
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import assert_ranks_equal, num_ranks, own_rank
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.bystander import Bystander
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = [
    "DEFAULT_BUCKET_BYTES",
    "SOLE_OWNER",
    "Division",
    "divide",
    "is_half",
    "needs_all_gradients",
    "starting_values",
]

DEFAULT_BUCKET_BYTES = 64 << 20
SOLE_OWNER = 0
"""The rank that steps everything, where tensors depend on each other."""

Values = Mapping[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Division:
    """The work of one optimizer, divided; the same on every rank but for what ``process_group`` says of this one."""

    spec: OptimizerSpec
    groups: Sequence[ParamGroup]
    """``params`` lists the ``PlacedParameter`` of the group."""
    arguments: Mapping[str, Any]
    """Constructor keywords for upstream."""
    placed: tuple[PlacedParameter, ...]
    """One entry a parameter, in group order: the index that everything counts by."""
    slices: Sequence[int]
    """Stepped by each rank on its own part."""
    plan: Plan
    """Of everything else."""
    is_together: bool
    """Whether one rank steps all tensors, with one instance."""
    has_masters: bool
    """Whether upstream steps fp32 copies of what the model holds in half precision."""
    bucket_bytes: int
    replicates: bool
    """Whether all ranks step alike what they hold whole, where it is elementwise."""
    by_stored_gradients: bool
    """Whether gradients are found in ``parameter.grad`` of the model, all of them, at a step."""
    process_group: dist.ProcessGroup | None
    """The ranks that share the work."""
    all_ranks: dist.ProcessGroup | None
    """All ranks that train the model."""

    def agree(self) -> None:
        """Compare names, shapes, layouts, owners and hyperparameters over the ranks. Collective.

        Raises:
            RanksDisagreeError: On all ranks, with the first entry that differs.
        """
        items: list[tuple[str, Any]] = [("optimizer", self.spec.name)]
        for number, group in enumerate(self.groups):
            values = self.spec.values_in(group, self.arguments)
            items += [
                (f"group {number}, {key}", value)
                for key, value in values.items()
                if key not in ("params", "param_names") and not callable(value)
            ]
        round_of = {item.index: bucket.index for bucket in self.plan.buckets for item in bucket.items}
        for index, one in enumerate(self.placed):
            described = (tuple(one.shape), one.dtype, one.layout, one.is_trained, one.is_idle)
            travel = ("owner", self.plan.owners.get(index), "round", round_of.get(index))
            items.append((f"parameter {one.fqn!r}", (*described, *travel)))
        assert_ranks_equal(
            f"The plan of {self.spec.name!r} differs between ranks",
            items,
            "Build the same model, with the same arguments, on every rank.",
            self.all_ranks,
        )

    @property
    def keeps_tensors(self) -> bool:
        """Whether upstream's parameters have storage of their own, from before its constructor on."""
        return self.spec.keeps_tensors or self.has_masters

    @property
    def lends_model(self) -> bool:
        """Whether upstream is given the model's own parameters: in one process, which has their gradients there too."""
        is_alone = num_ranks(self.all_ranks) == 1
        return is_alone and self.by_stored_gradients and not self.spec.driver.rebinds_parameters

    def names_by_group(self) -> list[list[str]]:
        """Logical names of the parameters of each group."""
        return [[one.fqn for one in group["params"]] for group in self.groups]

    def build_instances(self, values: Values | None) -> tuple[UpstreamInstance | None, list[UpstreamInstance]]:
        """Upstream's optimizers of this rank: one for what is stepped on slices, and for each round the owner's."""
        rank = own_rank(self.process_group)
        local = None
        if self.slices or not self.plan.buckets:
            local = self._instance({index: self.placed[index].local().shape for index in self.slices}, values)
        shapes = [{item.index: item.shape for item in bucket.owned[rank]} for bucket in self.plan.buckets]
        if not self.is_together or not shapes:
            return local, [self._instance(own, values) for own in shapes]
        if rank != SOLE_OWNER:
            return local, [Bystander(self.spec, self.groups, self.arguments)] * len(shapes)
        return local, [self._instance({k: v for own in shapes for k, v in own.items()}, values)] * len(shapes)

    def _instance(self, shapes: Mapping[int, torch.Size], values: Values | None) -> UpstreamInstance:
        return UpstreamInstance(self.spec, self.groups, shapes, self.arguments, self.seen_by(shapes, values))

    def seen_by(self, stepped: Collection[int], values: Values | None) -> Values | None:
        """Of these values, those that an instance sees which steps these tensors."""
        if values is None:
            return None
        return {index: one for index, one in values.items() if index in stepped or not self._is_stepped(index)}

    def _is_stepped(self, index: int) -> bool:
        return index in self.plan.owners or index in self.slices


def divide(
    spec: OptimizerSpec,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    *,
    process_group: dist.ProcessGroup | None = None,
    all_ranks: dist.ProcessGroup | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    master_weights: bool = False,
    replicates: bool = False,
    by_stored_gradients: bool = False,
) -> Division:
    """Decide who steps what. Not a collective: ranks that describe the same model decide alike.

    Args:
        spec: The optimizer; one that nobody described has its verdict, where several ranks share the work.
        groups: Param groups; ``params`` lists the ``PlacedParameter`` of the group.
        arguments: Constructor keywords for upstream.
        process_group: The ranks that share the work; the default group when None.
        all_ranks: All ranks that train the model: also the replicas of a shard group (HSDP).
        bucket_bytes: The most that a rank's buffer for one field of a round takes.
        master_weights: Whether upstream steps fp32 copies of what the model holds in half precision.
        replicates: Whether all ranks step alike what they hold whole, where it is elementwise.
        by_stored_gradients: Whether gradients are found in ``parameter.grad`` of the model, all of them, at a step.

    Raises:
        UnsupportedError: Upstream cannot step a parameter, or not in this way.
    """
    placed = tuple(one for group in groups for one in group["params"])
    values = [spec.values_in(group, arguments) for group in groups for _ in group["params"]]
    members = {index: (one, values[index]) for index, one in enumerate(placed) if one.is_trained}
    refuse_misfits(spec, list(members.values()), is_divided=num_ranks(all_ranks) > 1)
    is_together = _steps_together(spec, process_group)
    here = {index: member for index, member in members.items() if not isinstance(member[0].layout, Elsewhere)}
    replicates = replicates and num_ranks(process_group) > 1
    local = [index for index, member in here.items() if runs_on_local_slices(spec, *member, replicates, master_weights)]
    slices = [] if is_together else local
    owned = {index: member for index, member in here.items() if index not in slices}
    plan = plan_owners(spec, owned, bucket_bytes, process_group, SOLE_OWNER if is_together else None)
    return Division(
        spec=spec,
        groups=groups,
        arguments=arguments,
        placed=placed,
        slices=slices,
        plan=plan,
        is_together=is_together,
        has_masters=master_weights and any(is_half(one.dtype) for one, _ in members.values()),
        bucket_bytes=bucket_bytes,
        replicates=replicates,
        by_stored_gradients=by_stored_gradients,
        process_group=process_group,
        all_ranks=all_ranks,
    )


def needs_all_gradients(
    spec: OptimizerSpec, arguments: Mapping[str, Any], process_group: dist.ProcessGroup | None
) -> bool:
    """Whether no tensor can be stepped before every gradient is there."""
    return _steps_together(spec, process_group) or spec.driver.needs_total_norm(arguments)


def _steps_together(spec: OptimizerSpec, process_group: dist.ProcessGroup | None) -> bool:
    return spec.is_coupled or (spec.keeps_tensors and num_ranks(process_group) == 1)


def starting_values(division: Division) -> dict[int, Tensor] | None:
    """The true values of what this rank will step whole, for classes that may read them. Collective for such.

    One process hands upstream the model's own parameters where those are plain tensors.

    Returns:
        Tensors by index, on storage that nobody else writes to, or the model's own parameters; None for an optimizer
        that reads none.
    """
    if not division.keeps_tensors:
        return _lent(division) if division.lends_model else None
    values = _true_values(division)
    if division.has_masters:
        return {index: one.detach().float() if is_half(one.dtype) else one for index, one in values.items()}
    return values


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype is too coarse for small updates."""
    return dtype in (torch.bfloat16, torch.float16)


def _lent(division: Division) -> dict[int, Tensor]:
    every = enumerate(division.placed)
    return {index: one.parameter for index, one in every if one.is_trained and _is_plain(one)}


def _true_values(division: Division) -> dict[int, Tensor]:
    placed = division.placed
    values: dict[int, Tensor] = {index: placed[index].local() for index in division.slices}
    if num_ranks(division.process_group) == 1:
        here = [(index, one) for index, one in enumerate(placed) if not isinstance(one.layout, Elsewhere)]
        return {index: _of_model(one) for index, one in here if one.is_trained or _is_plain(one)}
    if division.is_together:  # frozen tensors that are there anyway, for a class that looks at all of its groups
        values |= {index: one.local() for index, one in enumerate(placed) if not one.is_trained and _is_plain(one)}

    def gather(bucket_at: int) -> Task[None]:
        bucket = division.plan.buckets[bucket_at]
        parts = {item.index: placed[item.index].local() for item in bucket.items}
        route = bucket.route(own_rank(division.process_group))
        (full,) = yield from gather_to_owner(bucket, [parts], route, division.process_group)
        values.update({index: tensor.clone() for index, tensor in full.items()})

    with torch.no_grad():
        run_tasks(gather(at) for at in range(len(division.plan.buckets)))
    return values


def _is_plain(one: PlacedParameter) -> bool:
    is_own = type(one.parameter) is nn.Parameter and not is_marked(one.parameter)
    return is_own and one.layout.is_replicated and one.shape == one.parameter.shape


def _of_model(one: PlacedParameter) -> Tensor:
    """What one process holds whole; engines that flatten do so there too."""
    return one.parameter if _is_plain(one) else one.local().view(one.shape)
