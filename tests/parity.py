"""The parity body: upstream in one process against dist_optim under a placement, with equal injected gradients.

A ``Case`` is data. ``run_case`` runs on every rank of a pool: it builds the reference with the upstream class alone
(no code of dist_optim), builds the subject with ``build_optimizer`` on a placed model, gives both the same full
gradients (the subject's cut by its layout), and compares every parameter after steps, bit for bit.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from placements import full_parameters, inject, place
from torch import Tensor, nn

import dist_optim
from dist_optim.generators import seed_generators

Kept = TypeVar("Kept")


class Net(nn.Module):
    """Shapes chosen to hurt: wide, tall and square matrices, odd sizes, one row, more ranks than rows, 0-D and 1-D."""

    def __init__(
        self,
        linear: Sequence[tuple[int, int]],
        extra: Sequence[tuple[int, ...]],
        experts: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(cols, rows, bias=at % 2 == 0) for at, (rows, cols) in enumerate(linear))
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in extra)
        if experts:
            self.experts = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in experts)


LINEAR = ((67, 40), (40, 67), (48, 48), (17, 80), (96, 32), (2, 24))
"""Rows x columns of the linear weights: tall, wide, square, wide, tall, two rows (fewer than three ranks)."""
EXTRA = ((33,), (5,), (1,), (31, 9))
EXPERTS = ((5, 14, 12), (3, 24, 64))
"""Stacks of matrices, of which four ranks hold one or two each, or parts of one; the second is worth quantizing."""


@dataclass(frozen=True)
class Case:
    """One comparison. ``make_reference`` gets plain param groups and returns the upstream optimizer."""

    name: str
    make_reference: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    hyperparameters: dict[str, Any]
    matrix: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of low-rank groups; empty for optimizers that take no target modules."""
    constructor: dict[str, Any] = field(default_factory=dict)
    """What upstream takes in its constructor alone: given to the subject; ``make_reference`` passes it by itself."""
    steps: int = 9
    linear: tuple[tuple[int, int], ...] = LINEAR
    extra: tuple[tuple[int, ...], ...] = EXTRA
    experts: tuple[tuple[int, int, int], ...] = ()
    growth: float = 1.4
    """Factor on the gradients from step to step, so that clips and limiters bind."""
    frozen: tuple[str, ...] = ("linears.4.weight",)
    without_gradient: tuple[str, ...] = ("extra.1",)
    targets: tuple[str, ...] = ("linears",)
    dtype: torch.dtype = torch.float32
    tolerance: float = 0.0
    """Allowed difference relative to the largest weight: 0, or 1e-6 for fused kernels, whose SIMD tails round
    differently in slices of other lengths."""
    equal_rates: bool = False
    """One learning rate for all groups: where upstream takes no other."""
    draws: bool = False
    """Upstream draws from the global generators: every step begins with equal ones."""
    label: str = ""
    """What sets this case apart from the family's others."""
    device: str = "cpu"
    """Where both sides have the model."""

    @property
    def takes_matrices(self) -> bool:
        """Whether upstream is given the matrices of a stack one by one."""
        return bool(self.matrix) or self.name == "muon"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.label, str(self.dtype).removeprefix("torch."))))


class Together(torch.optim.Optimizer):
    """Separate optimizers, stepped one after the other: the reference of several in one object."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.optimizers, self.param_groups = optimizers, groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's has overloads
        for optimizer in self.optimizers:
            optimizer.step()


def make_model(case: Case) -> Net:
    torch.manual_seed(0)
    model = Net(case.linear, case.extra, case.experts).to(case.device, case.dtype)
    for place_in_model, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(name not in case.frozen)
        parameter.place_in_model = place_in_model  # type: ignore[attr-defined]  # for references that sum in its order
    return model


def with_experts(case: Case) -> Case:
    """The case with stacks of experts besides."""
    return replace(case, experts=EXPERTS, targets=(*case.targets, "experts"))


def gradients(case: Case, model: nn.Module, step: int) -> dict[str, Tensor | None]:
    """Full gradients of one step, the same on every rank and for both sides; some parameters have none."""
    generator = torch.Generator("cpu").manual_seed(1000 + step)
    drawn: dict[str, Tensor | None] = {}
    for at, (name, parameter) in enumerate(model.named_parameters()):
        gradient = torch.randn(parameter.shape, generator=generator, device="cpu") * case.growth**step
        is_absent = name in case.frozen or name in case.without_gradient or (step % 4 == 2 and at == 3)
        drawn[name] = None if is_absent else gradient.to(parameter.device, case.dtype)
    return drawn


def param_groups(case: Case, named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two plain groups with weight decay and without, then the low-rank ones, as the subject is asked to arrange."""
    common = {key: value for key, value in case.hyperparameters.items() if key != "weight_decay"}
    decay = {**common, "weight_decay": case.hyperparameters["weight_decay"]} if _decays(case) else common
    is_matrix = {name: bool(case.matrix) and name.startswith(case.targets) and named[name].ndim == 2 for name in named}
    plain = [n for n in named if not is_matrix[n]]
    without_decay = {**common, "weight_decay": 0.0} if _decays(case) else common
    groups: list[dict[str, Any]] = [
        {"params": [named[n] for n in plain if named[n].ndim > 1], **decay},
        {"params": [named[n] for n in plain if named[n].ndim <= 1], **without_decay},
        {"params": [named[n] for n in named if is_matrix[n]], **decay, **case.matrix},
    ]
    return [group for group in groups if group["params"]]


def no_decay(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim <= 1]


def _decays(case: Case) -> bool:
    return "weight_decay" in case.hyperparameters


def reference_run(case: Case, divisor: int = 1) -> list[dict[str, Tensor]]:
    """Every parameter after every step, from the upstream class in one process; gradients are divided before."""
    model = make_model(case)
    leaves = {name: leaves_of(case, parameter) for name, parameter in model.named_parameters()}
    named = {f"{name}.{at}" if at else name: leaf for name, own in leaves.items() for at, leaf in enumerate(own)}
    optimizer = case.make_reference(param_groups(case, named))
    if hasattr(optimizer, "train"):
        optimizer.train()
    history = []
    for step in range(case.steps):
        for name, gradient in gradients(case, model, step).items():
            own = leaves[name]
            for at, leaf in enumerate(own):
                leaf.grad = None if gradient is None else (gradient if len(own) == 1 else gradient[at]) / divisor
        set_learning_rates(optimizer, case, step)
        optimizer.step()
        history.append(
            {
                name: (own[0] if len(own) == 1 else torch.stack(tuple(own))).detach().clone()
                for name, own in leaves.items()
            }
        )
    return history


def leaves_of(case: Case, parameter: nn.Parameter) -> list[nn.Parameter]:
    """What upstream is given for a parameter: itself, or each matrix of a stack as a parameter of its own."""
    if not (case.takes_matrices and tuple(parameter.shape) in case.experts):
        return [parameter]
    leaves = [nn.Parameter(matrix.clone()) for matrix in parameter.detach()]
    for leaf in leaves:
        leaf.place_in_model = parameter.place_in_model  # type: ignore[attr-defined]
    return leaves


_histories: dict[bytes, list[dict[str, Tensor]]] = {}


def reference_history(case: Case) -> list[dict[str, Tensor]]:
    """``reference_run``, computed once for all placements of the same case in this process."""
    return _last(_histories, case, reference_run)


def _last(kept: dict[bytes, Kept], case: Case, make: Callable[[Case], Kept]) -> Kept:
    """What was made of the case, while it is the last one that was asked for."""
    key = pickle.dumps(case)
    if key not in kept:
        kept.clear()
        kept[key] = make(case)
    return kept[key]


def set_learning_rates(optimizer: torch.optim.Optimizer, case: Case, step: int) -> None:
    """A rate that changes at every step, and differs between groups."""
    if case.draws:
        seed_generators(step)
    for number, group in enumerate(optimizer.param_groups):
        if group["lr"] is None:  # computed by the optimizer itself
            continue
        rate = case.hyperparameters["lr"] * 0.9**step * (1.0 + 0.5 * number * (not case.equal_rates))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def build_subject(case: Case, model: nn.Module, **options: Any) -> dist_optim.DistributedOptimizer:
    keywords: dict[str, Any] = {
        **case.hyperparameters,
        **case.matrix,
        **case.constructor,
        **options,
        "print_audit": False,
    }
    if case.matrix:
        keywords["target_modules"] = list(case.targets)
    return dist_optim.build_optimizer(
        model, case.name, no_decay=no_decay(make_model(case)) if _decays(case) else (), **keywords
    )


def run_case(case: Case, placement: str, **options: Any) -> list[str]:
    """The body: problems found on this rank, empty when every parameter is equal after every fourth step and the last.

    What differs in between would stay: in the weights, or in the state that the next steps are made of.
    """
    gaps = run_gaps(case, placement, 4, **options)
    return [str(gap) for gap in gaps if not gap.relative <= case.tolerance][:5]  # a NaN is a difference too


def run_gaps(case: Case, placement: str, every: int = 1, **options: Any) -> list[Gap]:
    """The distance of every parameter from the reference after so many steps each; zero where the bits are equal."""
    model = place(make_model(case), placement)
    optimizer = build_subject(case, model, **options)  # which refuses what upstream fails on
    expected = reference_history(case)
    assert moved(expected, case) > 0, "the reference does not move: the case compares nothing"
    optimizer.train()
    found = []
    for step in range(case.steps):
        take_step(case, model, optimizer, step)
        if step % every == 0 or step == case.steps - 1:
            found += gaps_between(expected[step], full_parameters(model), f"after step {step}")
    return found


def run_second_life(case: Case, placement: str) -> list[str]:
    """The body: save in the middle, load into fresh objects, go on; equal to the run that was never interrupted."""
    expected = reference_history(case)[-1]
    first = place(make_model(case), placement)
    optimizer = build_subject(case, first)
    optimizer.train()
    half = case.steps // 2 + 1
    for step in range(half):
        take_step(case, first, optimizer, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = place(make_model(case), placement)
    with torch.no_grad():
        for old, new in zip(first.parameters(), second.parameters(), strict=True):
            new.copy_(old)
    resumed = build_subject(case, second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(half, case.steps):
        take_step(case, second, resumed, step)
    return differences(case, expected, full_parameters(second), "after a second life")[:5]


def take_step(case: Case, model: nn.Module, optimizer: dist_optim.DistributedOptimizer, step: int) -> None:
    inject(model, gradients(case, _template(case), step))
    set_learning_rates(optimizer, case, step)
    optimizer.step()


def _template(case: Case) -> Net:
    """A model that nobody trains, for names and shapes; the same one for all steps of a case."""
    return _last(_templates, case, make_model)


_templates: dict[bytes, Net] = {}


@dataclass(frozen=True)
class Gap:
    """How far one parameter is from its reference: absolutely, and relative to the largest reference weight."""

    name: str
    when: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.name} differs {self.when} by {self.absolute:.3g}"


def gaps_between(expected: dict[str, Tensor], actual: dict[str, Tensor], when: str) -> list[Gap]:
    gaps = []
    for name, tensor in expected.items():
        absolute = (tensor.double() - actual[name].double()).abs().max().item()
        scale = tensor.double().abs().max().item()
        gaps.append(Gap(f"{name} {tuple(tensor.shape)}", when, absolute, absolute / scale if absolute else 0.0))
    return gaps


def differences(case: Case, expected: dict[str, Tensor], actual: dict[str, Tensor], when: str) -> list[str]:
    """The gaps that the case does not allow, in words."""
    return [str(gap) for gap in gaps_between(expected, actual, when) if not gap.relative <= case.tolerance]


def moved(history: list[dict[str, Tensor]], case: Case) -> float:
    """Largest change of any parameter over the reference run: comparing what stands still proves nothing."""
    start = dict(make_model(case).named_parameters())
    return max((history[-1][name] - start[name]).abs().max().item() for name in start)
