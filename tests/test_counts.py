"""What a steady step costs, counted: collectives, values read from tensors. Nothing here is timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import inject, own_group, place
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dist_optim
from dist_optim.errors import RanksDisagreeError
from dist_optim.exchange import packed, transfer
from dist_optim.testing import RankPool

COLLECTIVES = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_object",
    "all_gather",
    "broadcast",
    "reduce_scatter_tensor",
    "isend",
    "irecv",
)
OURS = str(Path(dist_optim.__file__).parent)
LOW_RANK: dict[str, Any] = {"target_modules": "all-linear", "rank": 2}
AGREEMENTS = 2
"""Before a step and after it: small, and over the host."""


def net(num_layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(num_layers)))


@contextmanager
def collectives_counted() -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counted[name] += 1
            return original(*args, **options)

        return call

    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in COLLECTIVES}):
        gather = counting("all_gather_single", packed.gather_single)
        with mock.patch.object(packed, "gather_single", gather):
            yield counted


def collectives_of_a_refused_rate() -> dict[str, int]:
    optimizer = steady("ddp", "sgd", 1)
    optimizer.param_groups[0]["lr"] *= 1 + dist.get_rank()
    with collectives_counted() as counted, pytest.raises(RanksDisagreeError, match="group 0, lr"):
        optimizer.step()
    return dict(counted)


def test_ranks_that_differ_find_out_what_by_one_more_collective(two_ranks: RankPool) -> None:
    for counted in two_ranks.run(collectives_of_a_refused_rate):
        assert counted == {"all_to_all_single": 1, "all_gather_object": 1}


class Reads(TorchDispatchMode):
    """Counts values that Python reads from tensors: on an accelerator each waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def steady(placement: str, name: str, num_layers: int, **options: Any) -> dist_optim.DistributedOptimizer:
    model = place(net(num_layers), placement)
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-3, print_audit=False, **options)
    for _ in range(3):
        give_gradients(model, num_layers)
        optimizer.step()
    give_gradients(model, num_layers)
    return optimizer


def give_gradients(model: nn.Module, num_layers: int) -> None:
    inject(model, {name: torch.ones(p.shape) for name, p in net(num_layers).named_parameters()})


def count_collectives(placement: str, name: str, options: dict[str, Any]) -> dict[str, int]:
    options = dict(options)
    most = 0 if options.pop("in packs", False) else transfer.MAX_PEERS
    optimizer = steady(placement, name, 6, **options)
    with mock.patch.object(transfer, "MAX_PEERS", most), collectives_counted() as counted:
        optimizer.step()
    return {"rounds": len(optimizer.plan.buckets), **counted}


MESSAGES = {"isend": 3, "irecv": 3}
"""A pair of ranks, of a round: gradients and parameters to the owner, parameters back."""


@pytest.mark.parametrize(
    ("placement", "name", "options", "expected"),
    [
        ("fsdp2", "adamw_torch", {}, {"rounds": 0}),
        ("ddp", "adamw_torch", {}, {"rounds": 1, "isend": 1, "irecv": 1}),
        ("fsdp2", "galore_adamw", LOW_RANK, {"rounds": 1, **MESSAGES}),
        ("fsdp2", "galore_adamw", {**LOW_RANK, "in packs": True}, {"rounds": 1, "all_to_all_single": AGREEMENTS + 2}),
        ("ddp", "adamw_torch", {"in packs": True}, {"rounds": 1, "all_gather_single": 1}),
    ],
)
def test_a_steady_step_makes_its_rounds_and_two_agreements(
    placement: str, name: str, options: dict[str, Any], expected: dict[str, int], two_ranks: RankPool
) -> None:
    """On the host in messages, among more ranks and on accelerators in packs."""
    for counted in two_ranks.run(count_collectives, placement, name, options):
        assert counted == {"all_to_all_single": AGREEMENTS, **expected}


def count_collectives_under_fsdp1() -> dict[str, int]:
    optimizer = steady("fsdp1", "adafactor", 6, bucket_bytes=256)
    routes = [bucket.route(dist.get_rank()) for bucket in optimizer.plan.buckets]
    expected = sum(2 * len(route.sends) + len(route.receives) for route in routes)
    with collectives_counted() as counted:
        optimizer.step()
    return {"rounds": len(routes), "expected": expected, **counted}


def test_rounds_of_what_lies_on_one_rank_send_nothing_to_it(two_ranks: RankPool) -> None:
    """FSDP1 leaves most tensors whole on one rank."""
    for counted in two_ranks.run(count_collectives_under_fsdp1):
        assert counted["isend"] == counted["irecv"] == counted["expected"] < 2 * counted["rounds"]


def count_reads(placement: str, name: str, num_layers: int, options: dict[str, Any]) -> tuple[int, int]:
    """Values that our step reads, and that upstream's own step on as many plain tensors does."""
    optimizer = steady(placement, name, num_layers, **options)
    with Reads() as ours:
        optimizer.step()
    instances = optimizer.holdings.instances
    with Reads() as upstreams:
        for instance in instances:
            for shadow in instance.shadows.values():
                shadow.data, shadow.grad = torch.zeros(shadow.shape), torch.ones(shadow.shape)
            instance.optimizer.step()
    return ours.count, upstreams.count


@pytest.mark.parametrize(
    ("placement", "name", "options"),
    [
        ("fsdp2", "adamw_torch", {}),
        ("ddp", "adamw_torch", {}),
        ("fsdp2", "galore_adamw", LOW_RANK),
        ("hsdp", "sgd", {}),
    ],
)
def test_a_steady_step_reads_no_value_that_upstream_does_not(
    placement: str, name: str, options: dict[str, Any], two_ranks: RankPool
) -> None:
    for ours, upstreams in two_ranks.run(count_reads, placement, name, 8, options):
        assert ours == upstreams


@pytest.mark.parametrize("norm_is_small", [False, True])
def test_adalomo_reads_one_value_a_tensor(norm_is_small: bool) -> None:
    """The root mean square of its weights; lomo-optim reads two where that is above the bound."""
    net_ = net(4)
    with torch.no_grad():
        for parameter in net_.parameters():
            parameter.mul_(1e-6 if norm_is_small else 1.0)
            parameter.grad = torch.ones_like(parameter)
    optimizer = dist_optim.build_optimizer(net_, "adalomo", lr=1e-3, fused_backward=False, print_audit=False)
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 2 * 4


def agreements_under_zero(sub_group_size: int) -> tuple[int, int]:
    import zero

    run = zero.ZeroRun("adamw_torch", {"lr": 1e-3}, 3, zero={"sub_group_size": sub_group_size})
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(2))
    counted = 0
    from dist_optim.stepping import presence

    def counting(*args: Any) -> Any:
        nonlocal counted
        counted += 1
        return agree(*args)

    agree = presence.agree_on_bits
    with mock.patch.object(presence, "agree_on_bits", counting):
        zero.train_engine(engine, run, range(2, 3))
    return len(engine.basic_optimizer.parts()), counted


def test_zero_agrees_once_a_step_however_many_parts_it_steps(two_ranks: RankPool) -> None:
    for num_parts, counted in two_ranks.run(agreements_under_zero, 1000):
        assert num_parts > 2 and counted == AGREEMENTS


def own_calls(placement: str, num_layers: int) -> int:
    """Calls of functions of dist_optim in a steady step, whose gradients come from a backward pass."""
    model = place(net(num_layers), placement)
    group = own_group() if placement == "none" else None
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, process_group=group, print_audit=False)
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: object) -> None:
        calls[event] += event == "call" and OURS in frame.f_code.co_filename

    for step in range(4):
        model(torch.ones(2, 8)).square().mean().backward()
        sys.setprofile(note if step == 3 else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        optimizer.zero_grad()
    return calls["call"]


@pytest.mark.parametrize(("placement", "most"), [("none", 0), ("fsdp2", 0), ("ddp", 3)])
def test_a_step_makes_few_calls_for_each_parameter(two_ranks: RankPool, placement: str, most: int) -> None:
    """Upstream's foreach makes none: what a wrapper costs on many small tensors are these."""
    few, many = two_ranks.run(own_calls, placement, 10), two_ranks.run(own_calls, placement, 30)
    assert min(few) > 0
    assert max(more - fewer for fewer, more in zip(few, many, strict=True)) <= most * 40, (few, many)
