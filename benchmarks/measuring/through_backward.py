"""Contenders whose gradients come from their engine's own backward, for what works inside it.

Each acts forward, backward and step together, and what the engine alone takes for the first two beside it is taken off:
the rest is what the optimizer costs, wherever it does its work. Gradients are each one's own, so weights are not
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from measuring.contenders import ALONE, OURS, Build, Contender, Problem, alone, build_ours

__all__ = ["ENGINE", "through_backward"]

ENGINE = "engine alone"
BATCH = 8


def through_backward(problem: Problem, layout: str, variants: dict[str, dict[str, Any]]) -> dict[str, Build]:
    """How to build each contender, one process first and the engine alone second.

    Args:
        problem: What is stepped.
        layout: ddp, fsdp2.
        variants: More options of ``build_optimizer`` by the name under which ours is listed with them.
    """
    builders: dict[str, Build] = {
        ALONE: lambda: alone(problem),
        ENGINE: lambda: _contender(problem, layout, ENGINE, lambda model: _nothing),
        "upstream": lambda: _contender(
            problem, layout, "upstream", lambda model: problem.recipe.upstream_optimizer(list(model.parameters())).step
        ),
    }
    for name, options in {OURS: {}, **variants}.items():
        builders[name] = lambda name=name, options=options: _contender(  # type: ignore[misc]
            problem, layout, name, lambda model: build_ours(problem, model, options).step
        )
    return builders


def _contender(
    problem: Problem, layout: str, name: str, step_of: Callable[[nn.Module], Callable[[], Any]]
) -> Contender:
    model = problem.placed(layout)
    step, examples = step_of(model), examples_of(problem)

    def whole() -> None:
        model(examples).square().mean().backward()
        step()

    def free() -> None:
        model.zero_grad()

    return Contender(name=name, prepare=free, step=whole, beside="" if name == ENGINE else ENGINE)


def examples_of(problem: Problem) -> Tensor:
    """What fits the model's first layer."""
    return torch.randn(BATCH, problem.gradients[0].shape[-1], device=problem.device)


def _nothing() -> None:
    pass
