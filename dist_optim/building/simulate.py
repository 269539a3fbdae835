"""What a step would take on machines that are not there: the real plan, and a model of links and arithmetic.

The plan, the rounds, their bytes and the owners are those of ``build_optimizer``. Seconds are an estimate: of compute,
by the planner's own costs; of communication, by bytes over the links, in the order in which rounds are in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from dist_optim.building.choice import resolve
from dist_optim.building.composing import Choice, Rest, compose
from dist_optim.errors import HyperparameterError
from dist_optim.exchange.plan import Plan
from dist_optim.exchange.routing import plan_owners, runs_on_local_slices
from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.layouts.layout import DimShard
from dist_optim.specs.driver import FLOPS_PER_ELEMENT
from dist_optim.stepping.division import DEFAULT_BUCKET_BYTES

__all__ = ["Machine", "Simulation", "seconds_of", "simulate", "timed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The ranks and what joins them; as they are out of the box, H100 nodes of 8 (vendor's figures).

    Args:
        elements_per_s: Elements of a tensor that one elementwise pass (AdamW in fp32: 28 bytes each) updates.
        flops_per_s: Of matrix products.
        ranks_per_node: Within a node links are faster.
        link_bytes_per_s: What a rank sends, and receives at the same time, within a node.
        network_bytes_per_s: The same between nodes.
        latency_s: Of one message.
    """

    elements_per_s: float = 3.35e12 / 28
    flops_per_s: float = 67e12
    ranks_per_node: int = 8
    link_bytes_per_s: float = 450e9
    network_bytes_per_s: float = 50e9
    latency_s: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One step of the optimizer; seconds are estimates, all else is the plan's."""

    step_s: float
    exposed_s: float
    """Of it, waiting for communication."""
    one_process_s: float
    """The step of one process that holds everything: compute alone."""
    sent_bytes: int
    """That the fullest rank sends or receives: gradients and parameters to owners, parameters back."""
    num_rounds: int
    imbalance: float
    """The busiest rank's compute, over the mean."""
    owned_imbalance: float
    """The elements that the fullest owner has, over the mean: state lies so too. 1 where nothing is owned."""


def simulate(
    model: nn.Module,
    optimizer: Choice,
    num_ranks: int,
    *,
    sharding: Literal["fsdp2", "ddp"] = "fsdp2",
    machine: Machine | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    target_modules: str | Sequence[str] | None = None,
    rest: Choice | None = None,
    **hyperparameters: Any,
) -> Simulation:
    """Plan a step of so many ranks, and estimate what it takes. One process, no process group.

    Args:
        model: Not sharded; on the meta device it takes no memory.
        optimizer: As in ``build_optimizer``, as are ``bucket_bytes``, ``target_modules``, ``rest`` and the
            hyperparameters.
        num_ranks: That share the work.
        sharding: ``"fsdp2"`` cuts each tensor along its first dim; ``"ddp"`` holds all of it on every rank.
        machine: What it runs on.

    Raises:
        HyperparameterError, TargetModulesError, ParameterError, UnsupportedError: As ``build_optimizer``.
    """
    if num_ranks < 1 or sharding not in ("fsdp2", "ddp"):
        raise HyperparameterError(
            f"num_ranks={num_ranks!r}, sharding={sharding!r}: give at least 1 rank, and 'fsdp2' or 'ddp'."
        )
    placed = detect(model)
    if sharding == "fsdp2" and num_ranks > 1:
        placed = {name: replace(one, layout=DimShard(0, num_ranks)) for name, one in placed.items() if one.shape}
    spec, groups, arguments = compose(
        model,
        resolve(optimizer),
        placed,
        hyperparameters,
        target_modules=target_modules,
        rest=Rest(rest, {}),
        splits_stacks=True,
    )
    members: list[tuple[PlacedParameter, dict[str, Any]]] = [
        (one, spec.values_in(group, arguments)) for group in groups for one in group["params"] if one.is_trained
    ]
    machine = machine or Machine()
    seconds = {
        at: seconds_of(spec.driver.step_cost(one.shape, values), one.shape.numel(), machine)
        for at, (one, values) in enumerate(members)
    }
    is_local = [num_ranks > 1 and runs_on_local_slices(spec, *member) for member in members]
    owned = {at: member for at, member in enumerate(members) if not is_local[at]}
    plan = plan_owners(spec, owned, bucket_bytes, None, world_size=num_ranks)
    # The first rank of a sharding by rows has as much as any other.
    here = [one.layout.numel_on(one.shape, 0) / max(1, one.shape.numel()) for one, _ in members]
    local_s = sum(seconds[at] * here[at] for at, local in enumerate(is_local) if local)
    return timed(plan, seconds, local_s, num_ranks, machine)


def seconds_of(cost: float, numel: int, machine: Machine) -> float:
    """Of one tensor's step: the planner's cost, as elementwise passes and as products of matrices."""
    passes, flops = min(cost, numel), max(0.0, cost - numel) * FLOPS_PER_ELEMENT
    return passes / machine.elements_per_s + flops / machine.flops_per_s


def timed(plan: Plan, seconds: Mapping[int, float], local_s: float, num_ranks: int, machine: Machine) -> Simulation:
    """One step by this plan.

    Args:
        plan: Owners and rounds.
        seconds: Of each tensor that is stepped, by its index.
        local_s: That the busiest rank takes for its slices.
        num_ranks: Of the plan.
        machine: What it runs on.
    """
    compute = [[sum(seconds[item.index] for item in items) for items in bucket.owned] for bucket in plan.buckets]
    there, back = [], []
    for bucket in plan.buckets:
        away = bucket.held_bytes * (num_ranks - 1) // num_ranks
        there.append(0 if bucket.is_replicated else 2 * away)
        back.append(away)
    rate = machine.link_bytes_per_s if num_ranks <= machine.ranks_per_node else machine.network_bytes_per_s

    def travel(nbytes: int) -> float:
        return machine.latency_s + nbytes / rate if nbytes and num_ranks > 1 else 0.0

    if any(bucket.is_replicated for bucket in plan.buckets):
        end, computed = _end_of_broadcasts(compute, [travel(one) for one in back])
    else:
        longest = [max(of_ranks) for of_ranks in compute]
        end = _end_of_exchange(longest, [travel(one) for one in there], [travel(one) for one in back])
        computed = sum(longest)
    busy = [local_s + sum(of_ranks[rank] for of_ranks in compute) for rank in range(num_ranks)]
    numels = [0] * num_ranks
    for bucket in plan.buckets:
        for rank, items in enumerate(bucket.owned):
            numels[rank] += sum(item.shape.numel() for item in items)
    return Simulation(
        step_s=local_s + end,
        exposed_s=end - computed,
        one_process_s=sum(seconds.values()),
        sent_bytes=sum(there) + sum(back),
        num_rounds=len(plan.buckets),
        imbalance=max(busy) * num_ranks / (sum(busy) or 1.0),
        owned_imbalance=max(numels) * num_ranks / sum(numels) if any(numels) else 1.0,
    )


def _end_of_broadcasts(compute: Sequence[Sequence[float]], scatters: Sequence[float]) -> tuple[float, float]:
    """When the last round of replicated tensors is back, and how long the busiest rank computes.

    Owners step one round after the other and wait for nobody; a round travels when all its owners have stepped theirs.
    """
    busy, link = [0.0] * len(compute[0]), 0.0
    for of_ranks, scatter in zip(compute, scatters, strict=True):
        busy = [before + own for before, own in zip(busy, of_ranks, strict=True)]
        link = max(link, *(at for at, own in zip(busy, of_ranks, strict=True) if own), 0.0) + scatter
    return max(link, *busy), max(busy)


def _end_of_exchange(steps: Sequence[float], gathers: Sequence[float], scatters: Sequence[float]) -> float:
    """When the last round is back, in the order of ``exchange.tasks.run_tasks``; a link carries one round at a time."""
    now, link = 0.0, 0.0
    arrived: list[float] = []
    returned: list[float] = []

    def gather(at: int) -> None:
        nonlocal link
        if at < len(steps):
            link = max(link, now) + gathers[at]
            arrived.append(link)

    gather(0)
    for at, step in enumerate(steps):
        gather(at + 1)
        now = max(now, arrived[at]) + step
        link = max(link, now) + scatters[at]
        returned.append(link)
        if at:
            now = max(now, returned[at - 1])
    return max([now, *returned[-1:]])
