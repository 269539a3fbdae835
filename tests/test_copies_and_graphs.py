"""What scripts do besides training: pickle the whole model, copy it, compile the step."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from placements import full_parameters, place
from torch import Tensor, nn

import dist_optim
from dist_optim.testing import RankPool

FUSED: dict[str, Any] = {"fused_backward": True}
TO_OWNERS: dict[str, Any] = {"reduce_to_owner": True}


def built(placement: str, name: str, options: dict[str, Any]) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    torch.manual_seed(0)
    model = place(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), placement)
    return model, dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **options)


def batch() -> Tensor:
    return torch.linspace(-1, 1, 16).view(2, 8)


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def train_compiled(placement: str, name: str, options: dict[str, Any]) -> list[str]:
    found = []
    for compiles in (False, True):
        model, optimizer = built(placement, name, options)
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for _ in range(3):
            model(batch()).square().mean().backward()
            step()
            optimizer.zero_grad()
        found.append(full_parameters(model))
    return differences(*found)


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "options"), [("adamw_torch", {}), ("muon", {}), ("adamw_torch", FUSED)], ids=["slices", "whole", "fused"]
)
def test_a_compiled_step_has_the_bits_of_the_step(
    placement: str, name: str, options: dict[str, Any], two_ranks: RankPool
) -> None:
    assert two_ranks.run(train_compiled, placement, name, options) == [[], []]


def test_a_graph_of_everything_is_refused_with_what_to_do() -> None:
    model, optimizer = built("none", "adamw_torch", {})
    model(batch()).square().mean().backward()
    with pytest.raises(Exception, match="without fullgraph=True"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def module_of(ddp: nn.Module) -> nn.Module:
    assert isinstance(ddp.module, nn.Module)
    return ddp.module


def pickle_and_copy(options: dict[str, Any]) -> tuple[list[str], list[str], bool]:
    """Of a model that was pickled and copied in the middle, what differs from one that was not, and from its copies."""
    found = []
    for is_copied in (False, True):
        model, optimizer = built("ddp", "adamw_torch", options)
        for step in range(4):
            if is_copied and step == 2:
                then = full_parameters(model)
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                loaded, copied = torch.load(file, weights_only=False), copy.deepcopy(module_of(model))
            model(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(full_parameters(model))
    copied(batch()).square().mean().backward()  # nobody steps it inside backward
    has_gradients = all(one.grad is not None for one in copied.parameters())
    stale = [name for one in (loaded, copied) for name in differences(then, full_parameters(one))]
    return differences(*found), stale, has_gradients


@pytest.mark.parametrize("options", [{}, FUSED, TO_OWNERS], ids=["stored", "fused", "to owners"])
def test_a_whole_model_is_pickled_and_copied_as_with_a_stock_optimizer(
    options: dict[str, Any], two_ranks: RankPool
) -> None:
    assert two_ranks.run(pickle_and_copy, options) == [([], [], True)] * 2
