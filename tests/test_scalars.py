"""Parameters without dimensions: CLIP's logit scale is one."""

from __future__ import annotations

import pytest
import torch
from every_name import SERVED, options_of
from placements import own_group, place
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.generators import seed_generators
from dist_optim.testing import RankPool

REFUSED = {"adalomo"}
"""Its class fails on such a tensor itself."""


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 5)
        self.outer = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x).tanh()) * self.scale.exp()
        return out


def train(name: str, placement: str) -> dict[str, Tensor]:
    model = Scaled()
    seed_generators(0)  # Kron draws from torch's and from numpy's
    placed = place(model, placement)
    group = own_group() if placement == "none" else None
    optimizer = dist_optim.build_optimizer(
        placed, name, lr=1e-2, process_group=group, fused_backward=None, print_audit=False, **options_of(name)
    )
    for step in range(8):  # schedule_free_radam leaves the weights alone in the first five
        placed(torch.ones(2, 6) * (1 + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def ends_alike(names: list[str]) -> list[str]:
    torch.compiler.set_stance("force_eager")  # torchao compiles a kernel for each shape otherwise
    problems = []
    for name in names:
        try:
            alone, together = train(name, "none"), train(name, "ddp")
        except UnsupportedError as error:
            problems += [] if name in REFUSED and "'scale'" in str(error) else [f"{name}: {error}"]
            continue
        different = [key for key in alone if not torch.equal(alone[key], together[key])]
        problems += [f"{name}: {different} differ"] if different else []
        problems += [f"{name}: the scale did not move"] if alone["scale"] == 1.0 else []
    return problems


def test_every_name_steps_a_parameter_without_dimensions(two_ranks: RankPool) -> None:
    assert two_ranks.run(ends_alike, SERVED) == [[], []]


@pytest.mark.parametrize("name", ["adamw_torch", "sgd"])
def test_it_moves_as_torchs_own_moves_it(name: str) -> None:
    model, plain = Scaled(), Scaled()
    ours = dist_optim.build_optimizer(model, name, lr=1e-2, weight_decay=0.0, print_audit=False)
    theirs = (torch.optim.AdamW if name == "adamw_torch" else torch.optim.SGD)(
        plain.parameters(), lr=1e-2, weight_decay=0
    )
    for net, optimizer in ((model, ours), (plain, theirs)):
        for step in range(3):
            net(torch.ones(2, 6) * (1 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
