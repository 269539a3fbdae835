"""What is frozen when the optimizer is built, and later; the rows of docs/situations.md have it under every engine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from sessions import ENGINES, Engine, Net, TorchSession, freeze
from situations import Outcome, compare, toggled
from torch import nn

import dist_optim
from dist_optim.errors import ParameterError
from dist_optim.exchange.plan import Item, assign_owners, make_plan
from dist_optim.layouts import freezing_fsdp2
from dist_optim.layouts.layout import Replicated
from dist_optim.testing import RankFailure, RankPool

BY_TITLE = {engine.title: engine for engine in ENGINES}
ROOT_ALONE = Engine("FSDP2, one unit", 2, "fsdp2")
"""It stays gathered after an evaluation."""


def items(sizes: list[int], idle: range) -> list[Item]:
    cpu = torch.device("cpu")
    return [
        Item(at, torch.Size([size]), Replicated(), torch.float32, cpu, float(size), at in idle)
        for at, size in enumerate(sizes)
    ]


def test_idle_tensors_do_not_move_the_owners_of_the_others_and_have_rounds_of_their_own() -> None:
    sizes = [7, 1000, 5, 4000, 3, 900, 2]
    every = items(sizes, range(1, 6, 2))
    trained = [item for item in every if not item.is_idle]
    owners = assign_owners(every, 3)
    assert [owners[item.index] for item in trained] == assign_owners(trained, 3)
    assert len({owners[1], owners[3], owners[5]}) == 3
    plan = make_plan(every, 3, 1 << 20)
    assert [{item.is_idle for item in bucket.items} for bucket in plan.buckets] == [{False}, {True}]
    mixed = assign_owners([replace(item, is_idle=False) for item in every], 3)
    assert [mixed[item.index] for item in trained] != assign_owners(trained, 3), "the control"


def held_bytes(name: str) -> tuple[int, int, str]:
    """Bytes of state of all ranks' shares while a layer is idle, and once it is trained; the audit's line."""
    session = TorchSession(BY_TITLE["FSDP2"], name, frozen="first", is_listed=True)
    session.train(range(2))
    (optimizer,) = session.optimizers
    idle = optimizer.optimizer_state_bytes()
    session.freeze("first", False)
    session.train(range(2, 3))
    return idle, optimizer.optimizer_state_bytes(), optimizer.route_audit()


def test_idle_tensors_have_no_state_before_their_first_gradient(two_ranks: RankPool) -> None:
    seen = two_ranks.run(held_bytes, "adamw_torch")
    moments = 2 * 4 * (17 * 23 + 23)
    assert moments <= sum(after - idle for idle, after, _ in seen) <= moments + 16
    assert all("2 of these tensors frozen for now" in audit for *_, audit in seen)


def fused(engine: Engine) -> None:
    options: dict[str, Any] = {"frozen": "first", "is_listed": True, "unused": True}
    session = engine.session("adamw_torch", extra={"fused_backward": True}, **options)
    alone = engine.alone("adamw_torch", **options)
    for one in (session, alone):
        one.train(range(2))
        one.freeze("first", False)
        one.train(range(2, 4))
    compare("Unfrozen", session, alone)


@pytest.mark.parametrize("title", ["DDP", "FSDP2"])
def test_inside_backward(title: str, two_ranks: RankPool) -> None:
    two_ranks.run(fused, BY_TITLE[title])


class Quantized(nn.Module):
    """A weight of bytes, one that hides behind a tensor class, and an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
        self.small = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.adapter = nn.Parameter(torch.ones(4))
        self.later = nn.Parameter(torch.ones(4), requires_grad=False)


def test_quantized_weights_stay_out() -> None:
    model = Quantized()
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", params=model.parameters(), lr=1e-2, print_audit=False)
    placed = {one.fqn: (one.is_trained, one.is_idle) for one in optimizer.placed_parameters()}
    assert placed == {
        "base": (False, False),
        "small": (False, False),
        "adapter": (True, False),
        "later": (True, True),
    }


def test_what_upstream_could_not_step_stays_out_too() -> None:
    model = Net()
    freeze(model, "first")
    chosen = ("first.weight", "first.bias", "idle.weight", "head.weight")
    parameters = [dict(model.named_parameters())[name] for name in chosen]
    optimizer = dist_optim.build_optimizer(model, "muon", params=parameters, lr=1e-2, print_audit=False)
    assert [one.is_trained for one in optimizer.placed_parameters()] == [True, False, True, True]


def test_refusals_say_what_to_do() -> None:
    model = Net()
    freeze(model, "first")
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, print_audit=False)
    with pytest.raises(ParameterError, match="'first.weight' is in a group already.*or list it there, frozen"):
        optimizer.add_param_group({"params": [model.first.weight]})
    freeze(model, "first", False)
    model.first.bias.grad = torch.ones(23)
    with pytest.raises(ParameterError, match="or list it in params="):
        optimizer.step()


def frozen_while_gathered(engine: Engine, is_forgotten: bool) -> Outcome:
    broken = mock.patch.object(freezing_fsdp2.GatheredFreezing, "carry_over", lambda self: None)
    with broken if is_forgotten else nullcontext():
        return toggled(engine, "adamw_torch", Path())


def test_what_is_frozen_while_fsdp2_has_it_gathered_stays_so(two_ranks: RankPool) -> None:
    assert all(str(outcome) == "right" for outcome in two_ranks.run(frozen_while_gathered, ROOT_ALONE, False))


def test_control_without_it_fsdp2_forgets(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="After layers were frozen and unfrozen"):
        two_ranks.run(frozen_while_gathered, ROOT_ALONE, True)
