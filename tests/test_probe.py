"""Classes that nobody described: proven separable per tensor at start-up, or refused with the reason."""

from __future__ import annotations

from typing import Any

import torch
from parity import Case, differences, full_parameters, make_model, place, reference_run, take_step
from torch import Tensor

import dist_optim
from dist_optim.generators import read_generators
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank


class CountsWithGradient(torch.optim.Optimizer):
    """Its rate falls with the position among the parameters that have a gradient: needs ghosts with gradients."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for position, parameter in enumerate(with_gradient):
                norm = parameter.grad.norm().clamp(min=1.0)
                parameter.add_(parameter.grad / norm, alpha=-group["lr"] / (1 + position))


class ClipsGlobally(torch.optim.SGD):
    """SGD with the norm over all tensors inside step(): cannot be stepped apart."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        super().step()


class DrawsNoise(torch.optim.SGD):
    """SGD that perturbs gradients with the global random generator."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter.grad, Tensor):
                    parameter.grad.add_(torch.randn_like(parameter.grad))
        super().step()


def reference(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return CountsWithGradient(groups)


def unknown_class_equals_itself_in_one_process() -> None:
    case = Case("CountsWithGradient", reference, {"lr": 1e-2})
    expected = reference_run(case)[-1]
    problems = []
    for placement in ("ddp", "fsdp2"):
        model = place(make_model(case), placement)
        optimizer = dist_optim.build_optimizer(model, CountsWithGradient, lr=1e-2, params=list(_groups(model)))
        for step in range(case.steps):
            take_step(case, model, optimizer, step)
        problems += differences(case, expected, full_parameters(model), f"under {placement}")
    assert_no_problems_on_any_rank(problems)


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1]}]


def test_unknown_class_equals_itself_in_one_process(two_ranks: RankPool) -> None:
    two_ranks.run(unknown_class_equals_itself_in_one_process)


def build(optimizer_class: type[torch.optim.Optimizer], **options: Any) -> None:
    dist_optim.build_optimizer(torch.nn.Linear(5, 7), optimizer_class, lr=1e-2, print_audit=False, **options)


def test_class_that_couples_tensors_is_served_in_one_process(one_rank: RankPool) -> None:
    one_rank.run(build, ClipsGlobally)


def test_probe_leaves_the_global_random_state_alone(two_ranks: RankPool) -> None:
    assert two_ranks.run(draw_around_a_build) == [True, True]


def draw_around_a_build() -> bool:
    before = read_generators()
    model = torch.nn.Linear(5, 7)
    expected = read_generators()
    dist_optim.build_optimizer(model, CountsWithGradient, lr=1e-2, print_audit=False)
    return read_generators() == expected != before
