"""What is measured side by side: the same model, gradients and hyperparameters, stepped in different ways.

Each builder returns a ``Contender`` on every rank. ``alone`` acts on rank 0 only, while the others wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.exchange.plan import assign_owners
from dist_optim.exchange.route import Item
from dist_optim.layouts.detect import detect
from dist_optim.layouts.layout import Replicated
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.specs.registry import Trait, get_spec
from measuring.recipes import Recipe, in_training

__all__ = [
    "ALONE",
    "FLOOR",
    "OURS",
    "SHARE",
    "Build",
    "Contender",
    "Problem",
    "alone",
    "bare_messages",
    "build_ours",
    "contenders_of",
    "has_floor",
    "owners_of",
    "share",
]

ALONE = "one process"
OURS = "dist_optim"
SHARE = "share"
FLOOR = "share and messages"
"""Not ways to step: bounds on what steps whole tensors."""
MakeModel = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to step. All three are called by all ranks, in the same order."""

    name: str
    prepare: Callable[[], None]
    """Gives fresh gradients; not timed."""
    step: Callable[[], None]
    weights: Callable[[], Sequence[Tensor]] = field(default=lambda: ())
    """Full tensors in the model's order, on rank 0; none where gradients are a contender's own."""
    beside: str = ""
    """Another contender, which does what ``step`` does beside the optimizer's work: its time is taken off."""


Build = Callable[[], Contender]


@dataclass(frozen=True, slots=True)
class Problem:
    """The model and the full gradients that all contenders step with, equal on all ranks."""

    recipe: Recipe
    make_model: MakeModel
    device: torch.device
    gradients: list[Tensor]

    @classmethod
    def of(cls, recipe: Recipe, make_model: MakeModel, device: torch.device) -> Problem:
        problem = cls(recipe, make_model, device, [])
        problem.gradients.extend(torch.randn(p.shape, device=device) for p in problem.model().parameters())
        return problem

    def model(self) -> nn.Module:
        """The same on every call and rank."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # else all GPUs'
            torch.manual_seed(0)
            return self.make_model().to(self.device)

    def placed(self, layout: str) -> nn.Module:
        """Under its engine."""
        if layout == "ddp":
            return DistributedDataParallel(self.model())
        return self.sharded() if layout == "fsdp2" else self.model()

    def sharded(self) -> nn.Module:
        """Under FSDP2, a unit for each block."""
        model, mesh = self.model(), dist.init_device_mesh(self.device.type, (num_ranks(),))
        for block in model.children():
            if any(True for _ in block.children()):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


def contenders_of(problem: Problem, layout: str, variants: dict[str, dict[str, Any]]) -> dict[str, Build]:
    """How to build each contender of a layout, ``alone`` first.

    Args:
        problem: What is stepped.
        layout: none, ddp, fsdp2.
        variants: More options of ``build_optimizer`` by the name under which ours is listed with them.
    """
    builders: dict[str, Build] = {ALONE: lambda: alone(problem)}
    if layout == "ddp":
        builders["replicas"] = lambda: replicas(problem)
        builders["ZeroRedundancyOptimizer"] = lambda: zero_redundancy(problem)
    if layout == "fsdp2":
        builders["gather all"] = lambda: gather_all(problem)
        builders["DTensors"] = lambda: on_dtensors(problem)
    if num_ranks() > 1 and has_floor(problem.recipe, layout):
        builders[FLOOR] = lambda: floor(problem, layout)
    for name, options in {OURS: {}, **variants}.items():
        builders[name] = lambda name=name, options=options: ours(problem, layout, name, options)  # type: ignore[misc]
    return builders


def has_floor(recipe: Recipe, layout: str) -> bool:
    """Whether tensors are stepped whole there."""
    return layout == "ddp" or bool(recipe.matrix) or Trait.ELEMENTWISE not in get_spec(recipe.name).traits


def alone(problem: Problem) -> Contender:
    """Unmodified upstream in one process."""
    if own_rank():
        return Contender(name=ALONE, prepare=_nothing, step=_nothing)
    return _whole(problem, ALONE)


def replicas(problem: Problem) -> Contender:
    """Unmodified upstream on every rank of DDP, on everything; gradients were reduced in backward."""
    return _whole(problem, "replicas")


def _whole(problem: Problem, name: str) -> Contender:
    parameters = list(problem.model().parameters())
    optimizer = problem.recipe.upstream_optimizer(parameters)
    return Contender(
        name=name, prepare=giving(parameters, problem.gradients), step=optimizer.step, weights=lambda: parameters
    )


def zero_redundancy(problem: Problem) -> Contender:
    """torch's own: whole tensors dealt out to ranks, each broadcast by its owner."""
    parameters, recipe = list(problem.model().parameters()), problem.recipe
    optimizer = ZeroRedundancyOptimizer(
        recipe.upstream_groups(parameters),
        optimizer_class=recipe.upstream_class(),
        **{**recipe.values, **recipe.constructor},
    )
    in_training(optimizer.optim)
    return Contender(
        name="ZeroRedundancyOptimizer",
        prepare=giving(parameters, problem.gradients),
        step=optimizer.step,
        weights=lambda: parameters,
    )


def gather_all(problem: Problem) -> Contender:
    """Ten lines that anyone would write: gather every gradient, step everything on every rank, keep the own shards."""
    sharded, whole = list(problem.sharded().parameters()), list(problem.model().parameters())
    cut = _cut(sharded, problem.gradients)
    optimizer = problem.recipe.upstream_optimizer(whole)

    def step() -> None:
        for full, part in zip(whole, sharded, strict=True):
            full.grad = part.grad.full_tensor()  # type: ignore[union-attr]
        optimizer.step()
        with torch.no_grad():
            for full, part in zip(whole, sharded, strict=True):
                chunks = full.chunk(num_ranks())
                if own_rank() < len(chunks):
                    part.to_local().copy_(chunks[own_rank()])  # type: ignore[attr-defined]

    return Contender(name="gather all", prepare=giving(sharded, cut), step=step, weights=lambda: _gathered(sharded))


def on_dtensors(problem: Problem) -> Contender:
    """Unmodified upstream on FSDP2's own sharded parameters."""
    sharded = list(problem.sharded().parameters())
    cut = _cut(sharded, problem.gradients)
    optimizer = problem.recipe.upstream_optimizer(sharded)
    return Contender(
        name="DTensors",
        prepare=giving(sharded, cut),
        step=optimizer.step,
        weights=lambda: _gathered(sharded),
    )


def share(problem: Problem) -> Contender:
    """Upstream on this rank's share of the tensors, while the others step theirs."""
    parameters = list(problem.model().parameters())
    dealt = zip(owners_of(parameters), parameters, problem.gradients, strict=True)
    mine = [(one, gradient) for owner, one, gradient in dealt if owner == own_rank()]
    owned, gradients = [one for one, _ in mine], [gradient for _, gradient in mine]
    return Contender(name=SHARE, prepare=giving(owned, gradients), step=problem.recipe.upstream_optimizer(owned).step)


def floor(problem: Problem, layout: str) -> Contender:
    """What nobody who steps whole tensors on one rank each can do without, and no copy of anything besides.

    This rank's share, and the messages bare, in buffers that are there: under FSDP2 parts of gradients and weights to
    owners and of weights back, under DDP weights from owners.
    """
    bare = share(problem)
    send = bare_messages(sum(one.numel() for one in problem.gradients), layout, problem.device)

    def step() -> None:
        bare.step()
        send()

    return replace(bare, name=FLOOR, step=step)


def owners_of(parameters: Sequence[Tensor]) -> list[int]:
    """By parameter the rank that steps it whole."""
    items = [Item(at, one.shape, Replicated(), one.dtype, one.device, one.numel()) for at, one in enumerate(parameters)]
    return assign_owners(items, num_ranks())


def bare_messages(num_elements: int, layout: str, device: torch.device) -> Callable[[], None]:
    """Sends what a step of so many elements, stepped whole by owners, has to send: fp32, from and to the same room."""
    ranks = num_ranks()
    each = num_elements // ranks // (ranks if layout == "fsdp2" else 1)
    sizes = [0 if rank == own_rank() else each for rank in range(ranks)]
    sent, received = (torch.ones(sum(sizes), device=device) for _ in range(2))

    def send() -> None:
        for _ in range(3 if layout == "fsdp2" else 1):
            dist.all_to_all_single(received, sent, sizes, sizes)

    return send


def ours(problem: Problem, layout: str, name: str, options: dict[str, Any]) -> Contender:
    """dist_optim, as it is used."""
    model = problem.placed(layout)
    optimizer = build_ours(problem, model, options)
    parameters = [one.parameter for one in detect(model).values()]
    cut = _cut(parameters, problem.gradients) if layout == "fsdp2" else problem.gradients
    return Contender(
        name=name,
        prepare=giving(parameters, cut),
        step=optimizer.step,
        weights=lambda: _gathered(list(model.parameters())),  # the model has to live: an optimizer looks at it
    )


def build_ours(problem: Problem, model: nn.Module, options: dict[str, Any]) -> dist_optim.DistributedOptimizer:
    """On a model under its engine, for training."""
    recipe = problem.recipe
    # Parameters that are listed all go to the optimizer, as they do upstream: Muon leaves the last layer out otherwise.
    params = None if recipe.matrix else list(model.parameters())
    optimizer = dist_optim.build_optimizer(
        model, recipe.name, params=params, print_audit=False, **recipe.options, **options
    )
    optimizer.train()
    return optimizer


def _nothing() -> None:
    pass


def _cut(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as FSDP2 leaves them."""
    return [
        distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if isinstance(parameter, DTensor)
    ]


def giving(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Callable[[], None]:
    """Gives new tensors, as after each backward; of other sizes from step to step, so that state counts."""
    numbers = itertools.count()

    def give() -> None:
        factor = 1 + next(numbers) % 4 / 4
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = _as_left_by_engine(gradient * factor, parameter)

    return give


def _as_left_by_engine(gradient: Tensor, parameter: Tensor) -> Tensor:
    """FSDP2's backward gives it the very object that says how the parameter is placed, and not an equal one."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return DTensor(gradient._local_tensor, parameter._spec, requires_grad=False)
    return gradient


def _gathered(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
