"""Who would step what, and what that puts on each rank: the work of an optimizer, dealt out without a process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dist_optim.building.composing import Rest, compose
from dist_optim.building.simulate import Machine, seconds_of, timed
from dist_optim.exchange.plan import Bucket, Plan
from dist_optim.exchange.route import is_large
from dist_optim.exchange.routing import plan_owners, refuse_misfits, runs_on_local_slices
from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.layouts.layout import FlatRange, Layout
from dist_optim.layouts.stack import Layer, Member, layer_of
from dist_optim.planning.model import PlannedModel
from dist_optim.planning.placement import PRECISIONS, Placement, numels_by_rank
from dist_optim.planning.rehearsal import Rehearsal
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.division import SOLE_OWNER, is_half

__all__ = ["Loads", "Work", "composed_work", "deal_out"]


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice(PlacedParameter):
    """A parameter without storage, that lies where the job will run."""

    runs_on: torch.device = torch.device("cuda")

    @property
    def device(self) -> torch.device:
        return self.runs_on


@dataclass(frozen=True, slots=True)
class Work:
    """What is stepped, by what."""

    spec: OptimizerSpec
    groups: list[ParamGroup]
    arguments: Mapping[str, Any]
    known: dict[Any, Any]
    """The model's."""

    @property
    def needs_all(self) -> bool:
        """Whether no tensor can be stepped before every gradient is there."""
        return self.spec.is_coupled or self.spec.driver.needs_total_norm(self.arguments)

    def members(self) -> list[tuple[int, PlacedParameter, dict[str, Any]]]:
        """Number of the group, parameter, and hyperparameters, in group order."""
        return [
            (number, one, self.spec.values_in(group, self.arguments))
            for number, group in enumerate(self.groups)
            for one in group["params"]
        ]

    def trained(self) -> list[list[str]]:
        """Names of the trained parameters as the engine has them, group by group: a stack once, not its matrices."""
        return [
            list(dict.fromkeys(one.whole().fqn for one in group["params"] if one.is_trained)) for group in self.groups
        ]


def composed_work(
    read: PlannedModel,
    spec: OptimizerSpec,
    strategy: str,
    precision: str,
    device: str,
    target_modules: str | Sequence[str] | None,
    options: dict[str, Any],
    *,
    splits_stacks: bool,
) -> Work:
    """What ``build_optimizer`` would step, each of a stack's matrices by itself where it does so."""
    rest = Rest(options.pop("rest", None), options.pop("rest_options", None) or {})
    no_decay = options.pop("no_decay", ())
    if any(record.name == "lr" and record.default is None for record in spec.records()):
        options.setdefault("lr", 1e-3)  # of which no byte depends
    read.module.to(torch.float32 if strategy.startswith("zero") else PRECISIONS[precision].weights)
    placed: dict[str, PlacedParameter] = {
        name: OnDevice(**{each.name: getattr(one, each.name) for each in fields(one)}, runs_on=torch.device(device))
        for name, one in detect(read.module).items()
    }
    composed = compose(
        read.module,
        spec,
        placed,
        options,
        no_decay=no_decay,
        target_modules=target_modules,
        rest=rest,
        splits_stacks=splits_stacks,
    )
    return Work(*composed, read.known)


@dataclass(slots=True)
class Loads:
    """What the optimizer's own work puts on each rank that shares it; tensors have a number for each."""

    state: Tensor
    masters: Tensor
    scratch: Tensor
    whole: Tensor
    """Whole gradients and weights of the rounds in flight."""
    numels: Tensor
    """Elements that it owns."""
    refresh: Tensor
    is_together: bool
    """Whether one rank steps all tensors."""
    wire: dict[str, int] = field(default_factory=dict)
    num_rounds: int = 0
    step_s: float = 0.0

    @classmethod
    def of(cls, ranks: int, *, is_together: bool) -> Loads:
        """Nothing yet, on so many ranks."""
        state, masters, scratch, whole = (torch.zeros(ranks, dtype=torch.int64, device="cpu") for _ in range(4))
        numels, refresh = (torch.zeros(ranks, dtype=torch.float64, device="cpu") for _ in range(2))
        return cls(state, masters, scratch, whole, numels, refresh, is_together)

    @property
    def refresh_s(self) -> float:
        return float(self.refresh.max())

    @property
    def owned_imbalance(self) -> float:
        total = float(self.numels.sum())
        return float(self.numels.max()) * len(self.numels) / total if total else 1.0


def deal_out(
    work: Work,
    placement: Placement,
    bucket_bytes: int,
    master_weights: bool,
    replicates: bool,
    machine: Machine,
    num_ranks: int,
) -> Loads:
    """Deal the work out as ``stepping.division.divide`` does, call by call."""
    spec, ranks = work.spec, placement.num_sharing
    every = work.members()
    trained = {index: member for index, member in enumerate(every) if member[1].is_trained}
    refuse_misfits(spec, [(one, values) for _, one, values in trained.values()], is_divided=num_ranks > 1)
    has_masters = master_weights and any(is_half(one.dtype) for _, one, _ in trained.values())
    dtype = torch.float32 if has_masters else placement.stepped_dtype
    rehearsal = Rehearsal(spec, work.groups, work.arguments, dtype, work.known)
    loads = Loads.of(ranks, is_together=spec.is_coupled and ranks > 1)
    calls: Sequence[Mapping[str, Layout]] = placement.calls
    if work.needs_all:
        calls = [{name: layout for call in calls for name, layout in call.items()}]
    copies = 4 if has_masters else dtype.itemsize if spec.keeps_tensors and ranks > 1 else 0
    for call in calls:
        here = {
            index: (number, replace(one, layout=_layout_of(one, call[name])), values)
            for index, (number, one, values) in trained.items()
            if (name := one.whole().fqn) in call
        }
        _add_call(loads, spec, rehearsal, here, bucket_bytes, copies, replicates, master_weights, machine)
    return loads


Stepped = tuple[int, PlacedParameter, dict[str, Any]]


def _layout_of(one: PlacedParameter, engines: Layout) -> Layout:
    """Of a parameter, or of a matrix of one, by that which the engine gives the parameter."""
    return layer_of(engines, one.member.shape, one.member.at) if isinstance(one.member, Member) else engines


def _add_call(
    loads: Loads,
    spec: OptimizerSpec,
    rehearsal: Rehearsal,
    here: Mapping[int, Stepped],
    bucket_bytes: int,
    copies: int,
    replicates: bool,
    master_weights: bool,
    machine: Machine,
) -> None:
    ranks = len(loads.state)
    slices = {
        index: (number, one)
        for index, (number, one, values) in here.items()
        if not loads.is_together and ranks > 1 and runs_on_local_slices(spec, one, values, replicates, master_weights)
    }
    owned = {index: (one, values) for index, (_, one, values) in here.items() if index not in slices}
    plan = plan_owners(spec, owned, bucket_bytes, None, SOLE_OWNER if loads.is_together else None, world_size=ranks)
    seconds = {
        index: seconds_of(spec.driver.step_cost(one.shape, values), one.shape.numel(), machine)
        for index, (_, one, values) in here.items()
    }
    for index, owner in plan.owners.items():
        number, one, values = here[index]
        stepped, numel = rehearsal.whole(number, one), one.shape.numel()
        loads.state[owner] += stepped.state
        loads.scratch[owner] = max(int(loads.scratch[owner]), stepped.scratch)
        loads.masters[owner] += copies * numel
        loads.numels[owner] += numel
        refresh = spec.driver.refresh_cost(one.shape, values)
        loads.refresh[owner] += seconds_of(refresh + numel, numel, machine) if refresh else 0.0
    busy = torch.zeros(ranks, dtype=torch.float64, device="cpu")
    for index, (number, one) in slices.items():
        numels = numels_by_rank(one.layout, one.shape, ranks)
        state, scratch = rehearsal.slices(number, one, numels)
        loads.state += state
        loads.scratch = torch.maximum(loads.scratch, scratch)
        loads.masters += copies * numels
        busy += seconds[index] * numels / max(1, one.shape.numel())
    _add_rounds(loads, plan)
    loads.step_s += timed(plan, seconds, float(busy.max()), ranks, machine).step_s


def _add_rounds(loads: Loads, plan: Plan) -> None:
    """Bytes that travel, and whole tensors of the two rounds in flight."""
    ranks = len(loads.state)
    loads.num_rounds += len(plan.buckets)
    if ranks == 1:
        return
    there, sent, back, written = (torch.zeros(ranks, dtype=torch.int64, device="cpu") for _ in range(4))
    before = torch.zeros(ranks, dtype=torch.int64, device="cpu")
    for bucket in plan.buckets:
        size = bucket.dtype.itemsize
        held = torch.tensor([size * sum(item.shape.numel() for item in items) for items in bucket.owned], device="cpu")
        if bucket.is_replicated:
            back += bucket.nbytes - held
            loads.whole = loads.whole.clamp(min=_room_of_small(bucket))  # large ones travel in place
            held.zero_()
        else:
            for owner, items in enumerate(bucket.owned):
                for item in items:
                    parts = size * numels_by_rank(item.layout, item.shape, ranks)
                    there[owner] += size * item.shape.numel() - parts[owner]
                    written[owner] += size * item.layout.copies * item.shape.numel() - parts[owner]
                    parts[owner] = 0
                    cut = item.layout.stack if isinstance(item.layout, Layer) else item.layout
                    if isinstance(cut, BoxShard | FlatRange) and cut.held is not None:
                        copy = torch.tensor(cut.held.copy, device="cpu")
                        # Of each part one copy, of the owner's own replica.
                        parts *= copy == copy[owner]
                    sent += parts
            held *= 2  # gradients and weights
        # What has arrived is unpacked into tensors of its own, while the round before is stepped.
        loads.whole = torch.maximum(loads.whole, held + torch.maximum(before, held))
        before = held
    busiest = int(torch.maximum(there, sent).max())
    for phase, nbytes in {
        "step: gradients to owners": busiest,
        "step: weights to owners": busiest,
        "step: weights back": max(busiest, int(written.max()), int(back.max())),
    }.items():
        loads.wire[phase] = loads.wire.get(phase, 0) + nbytes


def _room_of_small(bucket: Bucket) -> int:
    """Bytes of the one message of a replicated round's small tensors: each owner's, padded to the largest share."""
    size = bucket.dtype.itemsize
    numels = [[item.shape.numel() for item in items] for items in bucket.owned]
    share = max(sum(numel for numel in own if not is_large(numel, size)) for own in numels)
    return size * share * (1 + len(numels))
