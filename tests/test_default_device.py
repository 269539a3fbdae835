"""``torch.set_default_device``: what dist_optim makes for itself is where it has to be, whatever the default is.

Scripts for GPUs set it to "cuda"; here "meta" stands for a device that a loop's tensors on the host are not on.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from placements import full_parameters, place
from torch import Tensor, nn
from torch.optim import Optimizer

import dist_optim
from dist_optim.testing import RankPool

PACKAGE = Path(dist_optim.__file__).parent
FACTORIES = {
    *("arange", "asarray", "as_tensor", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


class Signs(Optimizer):
    """Nobody has described it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.add_(mean.sign(), alpha=-group["lr"])


def trained(placement: str, name: Any, options: dict[str, Any], device: str | None, folder: Path) -> dict[str, Tensor]:
    """Through all that makes tensors: build, clip, step, save, load."""
    torch.manual_seed(0)
    model = place(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), placement)
    batch = torch.ones(2, 8)
    torch.set_default_device(device)
    try:
        optimizer = dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **options)
        train(model, batch, optimizer)
        dist_optim.save_checkpoint(folder, model, optimizer)
        train(model, batch, optimizer)
        dist_optim.load_checkpoint(folder, model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, batch, optimizer)
    finally:
        torch.set_default_device(None)
    return full_parameters(model)


def train(model: nn.Module, batch: Tensor, optimizer: dist_optim.DistributedOptimizer) -> None:
    for _ in range(2):
        model(batch).square().mean().backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("placement", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("sgd", {"momentum": 0.9}), ("sgd", {"reduce_to_owner": True, "momentum": 0.9}), ("muon", {}), (Signs, {})],
    ids=["on slices", "to owners", "whole", "undescribed"],
)
def test_a_run_is_the_same_whatever_the_default_device(
    placement: str, name: Any, options: dict[str, Any], two_ranks: RankPool, tmp_path: Path
) -> None:
    plain, other = (
        two_ranks.run(trained, placement, name, options, device, tmp_path / str(device))[0] for device in (None, "meta")
    )
    assert all(torch.equal(plain[key], other[key]) for key in plain)


def made_without_a_device(source: str) -> list[int]:
    """Lines of calls of torch's factories that leave it to the default where their tensor is."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and not {keyword.arg for keyword in node.keywords} & {"device", None}
    ]


def test_every_tensor_that_is_made_says_where() -> None:
    found = {path.name: made_without_a_device(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert not {name: lines for name, lines in found.items() if lines}


def test_control_one_that_does_not_is_seen() -> None:
    assert made_without_a_device("a = torch.zeros(2)\nb = torch.zeros(2, device=c)\nd = torch.ones_like(a)") == [1]
