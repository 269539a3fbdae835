"""One optimizer class against itself in one process: alone on plain parameters, and through us under an engine.

Gradients are injected, equal on both sides; a schedule changes rates now and then; some parameters lack a gradient in
some steps. Half way all is saved, loaded into fresh objects, and goes on. Classes that evaluate a closure get one, over
a small network. What is compared: weights after every step, and what the groups hold in the end.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from parity import Case, full_parameters, gaps_between, gradients, inject, make_model, place
from torch import Tensor, nn
from torch.optim import Optimizer

import dist_optim
from dist_optim.generators import generators_kept, seed_generators
from dist_optim.layouts import detect
from dist_optim.ranks.agreement import own_rank

CASE = Case("any", torch.optim.SGD, {}, linear=((7, 5), (5, 7), (3, 8), (1, 6)), extra=((3,), (1,), (9, 4)))
"""Odd sizes, and fewer rows than ranks."""
WITH_SCALAR = replace(CASE, extra=((), *CASE.extra))
"""With a parameter without dims, which FSDP does not take."""
ALL_PRESENT = replace(CASE, without_gradient=(), frozen=(), growth=1.0)
"""For classes that fail on a missing gradient in one process too."""
STEPS_OF_CLOSURE = 6


def imported(module: str) -> Any:
    """The module; of timm without its models, which need more packages than its optimizers do."""
    if module == "timm.optim" and "timm" not in sys.modules and (found := importlib.util.find_spec("timm")) is not None:
        package, models = types.ModuleType("timm"), types.ModuleType("timm.models")
        package.__path__ = list(found.submodule_search_locations or ())
        vars(models)["group_parameters"] = None
        sys.modules |= {"timm": package, "timm.models": models}
    return importlib.import_module(module)


@dataclass(frozen=True)
class Choice:
    """A class, or a function that builds an optimizer, by where it is found: it travels to other processes."""

    module: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    of_matrices: Mapping[str, Any] = field(default_factory=dict)
    of_others: Mapping[str, Any] = field(default_factory=dict)
    """What the group of the matrices, and that of all else, must say."""

    def load(self) -> Any:
        return getattr(imported(self.module), self.name)

    def alone(self, params: Any) -> Optimizer:
        """Upstream's own, without us."""
        optimizer: Optimizer = self.load()(params, **self.arguments)
        return optimizer


@dataclass(frozen=True)
class Reference:
    """What the class does alone."""

    weights: list[dict[str, Tensor]]
    groups: list[dict[str, Any]]
    losses: list[float]


def shown(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Groups without what is no plain value."""
    return [
        {key: _plain(value) for key, value in group.items() if key[:5] != "param"} for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def change_rates(optimizer: Optimizer, step: int) -> None:
    """A schedule that acts now and then: in between, what the class writes itself stays."""
    for group in optimizer.param_groups if step % 3 == 1 else ():
        if isinstance(group.get("lr"), float):
            group["lr"] *= 0.7


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


# Injected gradients ---------------------------------------------------------------------------------------------------


def reference_run(case: Case, choice: Choice, has_two_groups: bool = True) -> Reference:
    """Raises what the class raises."""
    model = make_model(case)
    seed_generators(5)
    parameters = list(model.parameters())
    groups = [{"params": [one for one in parameters if one.ndim > 1], **_rate(choice), **choice.of_matrices}]
    groups += [{"params": [one for one in parameters if one.ndim <= 1], **choice.of_others}]
    optimizer = choice.alone(groups if has_two_groups else parameters)
    _call(optimizer, "train")
    history = []
    for step in range(case.steps):
        for name, gradient in gradients(case, model, step).items():
            model.get_parameter(name).grad = gradient
        change_rates(optimizer, step)
        optimizer.step()
        history.append(weights_of(model))
    return Reference(history, shown(optimizer), [])


def _rate(choice: Choice) -> dict[str, Any]:
    return {"lr": 0.02} if "lr" in choice.arguments or not choice.arguments else {}


def _call(optimizer: Any, name: str) -> None:
    if callable(getattr(optimizer, name, None)):
        getattr(optimizer, name)()


def run_given_gradients(
    case: Case, choice: Choice, expected: Reference, placement: str, has_two_groups: bool = True, **options: Any
) -> tuple[list[str], dist_optim.DistributedOptimizer]:
    """Problems found on this rank, and the optimizer in the end."""

    def build(model: nn.Module) -> dist_optim.DistributedOptimizer:
        placed = detect(model).values()
        groups: list[dict[str, Any]] = [
            {"params": [one.parameter for one in placed if len(one.shape) > 1], **_rate(choice), **choice.of_matrices},
            {"params": [one.parameter for one in placed if len(one.shape) <= 1], **choice.of_others},
        ]
        params: Any = groups if has_two_groups else None
        return dist_optim.build_optimizer(
            model, choice.load(), params=params, print_audit=False, **choice.arguments, **options
        )

    template, model = make_model(case), place(make_model(case), placement)
    seed_generators(5)
    if own_rank():  # the first rank draws as one process does
        seed_generators(50 + own_rank())
    optimizer = build(model)
    problems = []
    for step in range(case.steps):
        if step == case.steps // 2:
            model, optimizer = _again(model, optimizer, lambda: place(make_model(case), placement), build)
        inject(model, gradients(case, template, step))
        change_rates(optimizer, step)
        optimizer.step()
        gaps = gaps_between(expected.weights[step], full_parameters(model), f"after step {step}")
        problems += [str(gap) for gap in gaps if gap.absolute != 0]
    if repr(shown(optimizer)) != repr(expected.groups):
        problems.append(f"groups are {shown(optimizer)}, not {expected.groups}")
    return problems, optimizer


def _again(
    model: nn.Module,
    optimizer: dist_optim.DistributedOptimizer,
    make: Callable[[], nn.Module],
    build: Callable[[nn.Module], dist_optim.DistributedOptimizer],
) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    """Saved, and loaded into a fresh model and a fresh optimizer."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    with generators_kept():
        second = make()
        resumed = build(second)
        with torch.no_grad():
            for old, new in zip(model.parameters(), second.parameters(), strict=True):
                new.copy_(old)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    return second, resumed


# Closures -------------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """Its output is its loss, which is not quadratic in the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(given))).square().mean()
        return out


def batch(step: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def train_with_closure(model: nn.Module, optimizer: Optimizer, is_second: bool = False) -> list[float]:
    """The losses that ``step`` returns; as a second evaluation, the closure follows a backward pass of the loop's."""

    def closure_of(step: int) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(batch(step))
            loss.backward()
            return loss

        return closure

    losses = []
    for step in range(STEPS_OF_CLOSURE):
        if is_second:
            closure_of(step)()
        loss: Any = optimizer.step(closure_of(step))
        losses.append(math.nan if loss is None else float(torch.as_tensor(loss).detach()))
    return losses


def reference_with_closure(choice: Choice, is_second: bool = False) -> Reference:
    """Raises what the class raises."""
    model = Regression()
    seed_generators(5)
    optimizer = choice.alone(list(model.parameters()))
    losses = train_with_closure(model, optimizer, is_second)
    return Reference([weights_of(model)], shown(optimizer), losses)


def run_with_closure(
    choice: Choice, expected: Reference, placement: str, is_second: bool = False
) -> tuple[list[str], dist_optim.DistributedOptimizer]:
    """As ``run_given_gradients``; the engine reduces the gradients of every evaluation."""
    model = place(Regression(), placement)
    seed_generators(5)
    optimizer = dist_optim.build_optimizer(  # in several rounds
        model, choice.load(), print_audit=False, bucket_bytes=64, **choice.arguments
    )
    losses = train_with_closure(model, optimizer, is_second)
    gaps = gaps_between(expected.weights[-1], full_parameters(model), "in the end")
    problems = [str(gap) for gap in gaps if gap.absolute != 0]
    return problems + (
        [] if repr(losses) == repr(expected.losses) else [f"losses {losses}, not {expected.losses}"]
    ), optimizer


# DeepSpeed ------------------------------------------------------------------------------------------------------------


def _groups_for_engine(choice: Choice, model: nn.Module, has_two_groups: bool) -> Any:
    """All parameters; in groups where the class must be told which are matrices, or if asked for."""
    parameters = list(model.parameters())
    if not choice.of_matrices and not has_two_groups:
        return parameters
    return [
        {"params": [one for one in parameters if one.ndim > 1], **choice.of_matrices},
        {"params": [one for one in parameters if one.ndim <= 1], **choice.of_others},
    ]


def reference_of_engine(choice: Choice, has_two_groups: bool = False) -> Reference:
    """The network of the closures, trained by its own gradients. Raises what the class raises."""
    model = Regression()
    seed_generators(5)
    optimizer = choice.alone(_groups_for_engine(choice, model, has_two_groups))
    _call(optimizer, "train")
    for step in range(STEPS_OF_CLOSURE):
        model.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    return Reference([weights_of(model)], shown(optimizer), [])


def run_under_zero(
    choice: Choice, expected: Reference, stage: int, directory: str, has_two_groups: bool = False, **zero: Any
) -> tuple[list[str], dist_optim.DistributedOptimizer]:
    """The same network through the engine; half way it is saved and loaded by the engine.

    ``zero`` are further options of the configuration's section of that name.
    """
    from zero import deepspeed

    from dist_optim.integrations.deepspeed.engine import build_optimizer_for_engine

    def engine_of() -> Any:
        model = Regression()
        params = _groups_for_engine(choice, model, has_two_groups) if choice.of_matrices or has_two_groups else None
        client = build_optimizer_for_engine(model, choice.load(), params=params, print_audit=False, **choice.arguments)
        config = {
            "train_micro_batch_size_per_gpu": 6,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, **zero},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        engine = package.initialize(model=model, optimizer=client, config=config)[0]
        client.attach(engine)
        return engine, client

    def train(engine: Any, steps: range) -> None:
        for step in steps:
            engine.backward(engine(batch(step)))
            engine.step()

    package = deepspeed()
    engine, client = engine_of()
    seed_generators(5)
    train(engine, range(STEPS_OF_CLOSURE // 2))
    engine.save_checkpoint(directory)
    with generators_kept():
        engine, client = engine_of()
        engine.load_checkpoint(directory)
    train(engine, range(STEPS_OF_CLOSURE // 2, STEPS_OF_CLOSURE))
    with package.zero.GatheredParameters(list(engine.module.parameters())):
        weights = weights_of(engine.module)
    problems = [str(gap) for gap in gaps_between(expected.weights[-1], weights, "in the end") if gap.absolute != 0]
    there, here = client.param_groups[0], expected.groups[0]  # DeepSpeed's has hyperparameters, and no counters
    wrong = {
        key: (there[key], here[key])
        for key in there.keys() & here.keys()
        if repr(_plain(there[key])) != repr(here[key])
    }
    problems += [f"groups differ: {wrong}"] if wrong else []
    return problems, client.parts()[0]
