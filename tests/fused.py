"""The parity body inside backward: losses whose gradients are given tensors, through real engines and real hooks.

Every parameter enters the loss as ``(parameter * gradient).sum()``, so that autograd delivers exactly that gradient.
Rank 0 alone has one, the others zeros: whatever the engine's order of summation, the average is
``gradient / world_size`` to the bit, and that is what the reference gets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parity import (
    Case,
    Gap,
    build_subject,
    gaps_between,
    gradients,
    make_model,
    moved,
    reference_run,
    set_learning_rates,
)
from placements import full_parameters, place
from torch import Tensor, nn

import dist_optim
from dist_optim.layouts.detect import clean_name
from dist_optim.ranks.agreement import num_ranks, own_rank


class Injected(nn.Linear):
    """A linear layer's parameters, in a module that FSDP2 wraps as a unit of its own."""

    def forward(self, given: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return injected_loss(self, given)


class InjectedNet(nn.Module):
    """The names and shapes of ``parity.Net``; the loss that injects gradients."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            Injected(cols, rows, bias=at % 2 == 0, dtype=case.dtype) for at, (rows, cols) in enumerate(case.linear)
        )
        self.extra = nn.ParameterList(nn.Parameter(torch.empty(shape, dtype=case.dtype)) for shape in case.extra)
        if case.experts:
            self.experts = nn.ParameterList(nn.Parameter(torch.empty(one, dtype=case.dtype)) for one in case.experts)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        loss = torch.zeros(())
        for name, module in self.named_children():
            for at, child in enumerate(module.children()):
                prefix = f"{name}.{at}."
                loss = loss + child({n.removeprefix(prefix): g for n, g in given.items() if n.startswith(prefix)})
        own = {name.removeprefix("extra."): gradient for name, gradient in given.items() if name.startswith("extra.")}
        return loss + injected_loss(self.extra, own)


def injected_loss(module: nn.Module, given: dict[str, Tensor]) -> Tensor:
    loss = torch.zeros(())
    for name, parameter in module.named_parameters(recurse=False):
        if name in given:
            loss = loss + (parameter * given[name]).float().sum()
    return loss


def subject_net(case: Case) -> nn.Module:
    """With the weights and the frozen parameters of the case's own model."""
    model, source = InjectedNet(case), make_model(case)
    model.to(case.device).load_state_dict(source.state_dict())
    for parameter, like in zip(model.parameters(), source.parameters(), strict=True):
        parameter.requires_grad_(like.requires_grad)
    return model


def given_gradients(case: Case, step: int, absent_there: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What this rank's loss injects: all at rank 0, zeros at the others, which may lack some altogether."""
    full = {name: g for name, g in gradients(case, make_model(case), step).items() if g is not None}
    if own_rank() == 0:
        return full
    return {name: torch.zeros_like(g) for name, g in full.items() if name not in absent_there}


def fused_reference(case: Case) -> list[dict[str, Tensor]]:
    """Every parameter after every step: the plain optimizer in one process, from the averages of these gradients."""
    return reference_run(case, num_ranks())


def run_fused(case: Case, placement: str, absent_there: tuple[str, ...] = (), **options: Any) -> list[str]:
    """The body: problems found on this rank, empty when every parameter is equal after every step."""
    return [
        str(gap) for gap in fused_gaps(case, placement, absent_there, **options) if not gap.relative <= case.tolerance
    ][:5]


def fused_gaps(case: Case, placement: str, absent_there: tuple[str, ...] = (), **options: Any) -> list[Gap]:
    model = place_injected(case, placement)
    optimizer = build_subject(case, model, fused_backward=True, **options)  # which refuses what upstream fails on
    expected = fused_reference(case)
    assert moved(expected, case) > 0, "the reference does not move: the case compares nothing"
    optimizer.train()
    found = []
    for step in range(case.steps):
        fused_step(case, model, optimizer, step, absent_there)
        found += gaps_between(expected[step], full_parameters(model), f"after step {step}")
    return found


def fused_step(
    case: Case,
    model: nn.Module,
    optimizer: dist_optim.DistributedOptimizer,
    step: int,
    absent_there: tuple[str, ...] = (),
) -> None:
    set_learning_rates(optimizer, case, step)
    loss = model(given_gradients(case, step, absent_there))
    if "clip_grad_norm" in case.constructor:
        optimizer.backward(loss)
    else:
        loss.backward()
    waiting = [clean_name(model, name) for name, p in model.named_parameters() if p.grad is not None]
    assert not waiting, f"stored gradients: {waiting}"
    optimizer.step()
    optimizer.zero_grad()


def place_injected(case: Case, placement: str) -> nn.Module:
    return place(subject_net(case), placement)


def world_size() -> int:
    return dist.get_world_size()
