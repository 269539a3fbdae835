"""In one process upstream is given the model's own parameters, and does to them what it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from any_classes import DrawsNoise
from every_name import SERVED, options_of
from placements import own_group, place
from torch import nn

import dist_optim
from dist_optim.testing import RankPool

OF_STACKS: dict[str, Any] = {"target_modules": ["first", "experts"], "rank": 2}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->bo", x, self.weight)


class Awkward(nn.Module):
    """Stacked experts, of which each is projected alone; a frozen tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.experts = Experts()
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.experts(self.first(x).tanh())
        out: torch.Tensor = self.last(hidden * self.frozen)
        return out


def train(model: nn.Module, optimizer: Any, steps: int = 4) -> None:
    for step in range(steps):
        model(torch.ones(2, 6) * (1 + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def seen_by_upstream(optimizer: dist_optim.DistributedOptimizer) -> set[int]:
    return {
        id(one)
        for instance in optimizer.holdings.instances
        for group in instance.optimizer.param_groups
        for one in group["params"]
    }


def of_model(model: nn.Module) -> set[int]:
    return {id(one) for one in model.parameters() if one.requires_grad}


@pytest.mark.parametrize("choice", ["adamw_torch", "adafactor", "stable_adamw", "muon", "galore_adamw", DrawsNoise])
def test_upstream_has_the_models_own_parameters(choice: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    options = options_of(choice) if isinstance(choice, str) else {}
    optimizer = dist_optim.build_optimizer(model, choice, lr=1e-2, print_audit=False, **options)
    before = [one.data_ptr() for one in model.parameters()]
    train(model, optimizer)
    assert of_model(model) <= seen_by_upstream(optimizer)
    assert [one.data_ptr() for one in model.parameters()] == before


def test_gradients_stay_with_the_model() -> None:
    model = nn.Linear(6, 5)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, print_audit=False)
    model(torch.ones(2, 6)).sum().backward()
    gradients = [one.grad for one in model.parameters()]
    optimizer.step()
    assert all(one.grad is gradient for one, gradient in zip(model.parameters(), gradients, strict=True))
    optimizer.zero_grad()
    assert all(one.grad is None for one in model.parameters())


REBINDS = {"galore_adamw_8bit"}
ONLY_IN_BACKWARD = [name for name in SERVED if name.endswith("_layerwise")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_storage_and_gradient_stay_with_every_name(dtype: torch.dtype) -> None:
    problems = []
    with torch.compiler.set_stance("force_eager"):
        for name in sorted(set(SERVED) - set(ONLY_IN_BACKWARD)):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(80, 96), nn.LayerNorm(96), nn.Linear(96, 4)).to(dtype)
            optimizer = dist_optim.build_optimizer(
                model, name, lr=1e-2, print_audit=False, fused_backward=False, **options_of(name)
            )
            for _ in range(2):
                model(torch.ones(2, 80, dtype=dtype)).square().mean().backward()
                before = [(one.data_ptr(), one.grad) for one in model.parameters()]
                optimizer.step()
                after = [(one.data_ptr(), one.grad) for one in model.parameters()]
                is_same = [old[0] == new[0] and old[1] is new[1] for old, new in zip(before, after, strict=True)]
                problems += [] if all(is_same) and not any(map(vars, model.parameters())) else [name]
                optimizer.zero_grad()
            is_lent = all(instance.of_model for instance in optimizer.holdings.instances)
            problems += [] if is_lent == (name not in REBINDS) else [f"{name} is lent: {is_lent}"]
    assert problems == []


def test_some_are_lent_and_some_are_not() -> None:
    """Each expert of a stack is a matrix of its own, in a shadow; what is not stacked is lent, and nothing is lost."""
    model, alone = Awkward(), Awkward()
    optimizer = dist_optim.build_optimizer(model, "galore_adamw", lr=1e-2, print_audit=False, **OF_STACKS)
    own = seen_by_upstream(optimizer)
    assert id(model.first.weight) in own and id(model.experts.weight) not in own and id(model.frozen) not in own
    train(model, optimizer)
    again = dist_optim.build_optimizer(alone, "galore_adamw", lr=1e-2, print_audit=False, **OF_STACKS)
    for instance in again.holdings.instances:
        assert instance.of_model
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    alone.load_state_dict(model.state_dict())
    train(model, optimizer)
    train(alone, again)
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


def test_masters_are_not_the_models_and_whole_precision_beside_them_is() -> None:
    model = nn.Sequential(nn.Linear(6, 5).bfloat16(), nn.Linear(5, 4))
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, master_weights=True, print_audit=False)
    own = seen_by_upstream(optimizer)
    assert {id(one) in own for one in model[0].parameters()} == {False}
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    before = [one.detach().clone() for one in model.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))


def lent_on(placement: str, options: dict[str, Any]) -> bool:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    placed = place(model, placement)
    optimizer = dist_optim.build_optimizer(placed, "adamw_torch", lr=1e-2, print_audit=False, **options)
    return any(instance.of_model for instance in optimizer.holdings.instances)


@pytest.mark.parametrize(
    ("placement", "options"), [("ddp", {}), ("ddp", {"replicate": "elementwise"}), ("fsdp2", {})], ids=str
)
def test_several_ranks_lend_nothing(placement: str, options: dict[str, Any], two_ranks: RankPool) -> None:
    assert two_ranks.run(lent_on, placement, options) == [False, False]


def fused_alone() -> bool:
    model = nn.Linear(6, 5)
    optimizer = dist_optim.build_optimizer(
        model, "adamw_torch", lr=1e-2, fused_backward=True, process_group=own_group(), print_audit=False
    )
    return any(instance.of_model for instance in optimizer.holdings.instances)


def test_inside_backward_nothing_is_lent(one_rank: RankPool) -> None:
    assert one_rank.run(fused_alone) == [False]
