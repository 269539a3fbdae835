"""One run on a small Llama under every strategy, by given gradients: what one strategy saves, another goes on with."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from end_to_end import batch, make_llama
from fused import injected_loss
from placements import full_parameters, inject, place
from torch import Tensor, nn
from zero import ZeroRun, engine_of
from zero_names import NAMES_OF_BOTH, run_of_name

import dist_optim
from dist_optim.generators import seed_generators
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.testing import RankPool

LAYERWISE = "_layerwise"
BREAK, STEPS = 4, 7
"""Saved after so many steps, and trained on to so many: GaLore's projectors are made anew in between."""

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """One optimizer, the dtype of the model where an engine keeps masters of it, and when it steps."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    half: str = ""
    is_inside: bool = False
    """Whether losses bring the gradients, and it steps inside backward where that is served."""
    is_reference: bool = False
    """Of one that is inside: the same gradients, stored."""

    @property
    def reference(self) -> Recipe:
        """The same algorithm, from stored gradients."""
        return replace(self, name=self.name.removesuffix(LAYERWISE), is_reference=True)

    def gradients(self, step: int) -> Values:
        """What every side steps by: where a loss brings them, they survive what an engine multiplies and divides by."""
        generator = torch.Generator().manual_seed(1000 + step)
        made = {name: torch.randn(one.shape, generator=generator) * 0.1 for name, one in _parameters()}
        return {name: one.bfloat16().float() for name, one in made.items()} if self.is_inside else made

    def start(self) -> nn.Module:
        """The model, in fp32: rounded where masters begin from a model in half precision."""
        model = make_llama()
        dtype = {"": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.half]
        return model.to(dtype).float()

    def __str__(self) -> str:
        is_named = self.is_inside and not self.name.endswith(LAYERWISE)
        return f"{self.name} {self.half}".strip() + (INSIDE if is_named else "")


@dataclass(frozen=True)
class Strategy:
    """An engine on a number of ranks."""

    name: str
    num_ranks: int
    placement: str = ""
    """Of ``placements.place``."""
    stage: int = -1
    """Of ZeRO."""
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}:{self.num_ranks}" if self.num_ranks > 1 else self.name

    def side(self, recipe: Recipe) -> Side:
        """Build it. Collective."""
        return _UnderZero(self, recipe) if self.stage >= 0 else _UnderTorch(self, recipe)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STRATEGIES = (
    Strategy("one", 1, "none"),
    Strategy("ddp", 2, "ddp"),
    Strategy("ddp", 3, "ddp"),
    Strategy("fsdp1", 2, "fsdp1"),
    Strategy("fsdp2", 2, "fsdp2 units"),
    Strategy("fsdp2", 3, "fsdp2"),
    Strategy("hsdp", 4, "hsdp"),
    Strategy("zero0", 2, stage=0),
    Strategy("zero1", 2, stage=1),
    Strategy("zero2", 2, stage=2),
    Strategy("zero2", 3, stage=2),
    Strategy("zero2 offload", 2, stage=2, zero=OFFLOAD),
    Strategy("zero3", 2, stage=3),
    Strategy("zero3", 3, stage=3),
    Strategy("zero3 offload", 2, stage=3, zero=OFFLOAD | {"sub_group_size": 20_000}),
)


def strategy(text: str) -> Strategy:
    """The one that is written so."""
    return next(one for one in STRATEGIES if str(one) == text)


@functools.cache
def _parameters() -> list[tuple[str, nn.Parameter]]:
    return list(make_llama().named_parameters())


class Side(ABC):
    """A model in training."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.schedule: Any = None

    @abstractmethod
    def step(self, at: int) -> None:
        """Take the step of this number."""

    @abstractmethod
    def weights(self) -> Values:
        """Copies of what is trained, whole, on every rank."""

    @property
    @abstractmethod
    def pair(self) -> tuple[Any, Any]:
        """Model and optimizer, as a user has them."""

    def save(self, folder: Path) -> None:
        dist_optim.save_checkpoint(folder, *self.pair, self.schedule, rehearse=True)

    def load(self, folder: Path) -> None:
        dist_optim.load_checkpoint(folder, *self.pair, self.schedule)


class _UnderTorch(Side):
    def __init__(self, strategy: Strategy, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.is_inside = recipe.is_inside and not recipe.is_reference and strategy.placement != "fsdp1"
        model = recipe.start()
        if self.is_inside:
            _let_losses_be_given(model)
        self.model = place(model, strategy.placement)
        self.optimizer = dist_optim.build_optimizer(
            self.model, recipe.name, print_audit=False, fused_backward=self.is_inside, **recipe.options
        )
        self.schedule = _schedule(self.optimizer)

    def step(self, at: int) -> None:
        given = self.recipe.gradients(at)
        seed_generators(at)
        if self.is_inside:  # the first rank's alone, so that the average is it whatever the order of summation
            share = num_ranks() if own_rank() == 0 else 0
            self.model({name: one * share for name, one in given.items()}).backward()
        else:
            inject(self.model, dict(given))
        self.optimizer.step()
        self.schedule.step()

    def weights(self) -> Values:
        return {name: one.cpu() for name, one in full_parameters(self.model).items()}

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.model, self.optimizer


def _let_losses_be_given(model: nn.Module) -> None:
    """From now on a call with a tensor for each parameter returns the loss whose gradients those are."""
    for module in model.modules():
        module.forward = functools.partial(_given_loss, module)


def _given_loss(module: nn.Module, given: Values) -> Tensor:
    loss = injected_loss(module, given)
    for name, child in module.named_children():
        loss = loss + child(
            {key.removeprefix(f"{name}."): one for key, one in given.items() if key.startswith(f"{name}.")}
        )
    return loss


class _UnderZero(Side):
    def __init__(self, strategy: Strategy, recipe: Recipe) -> None:
        super().__init__(recipe)
        config: dict[str, Any] = {recipe.half: {"enabled": True}} if recipe.half else {}
        if recipe.half == "fp16":
            config["fp16"] |= {"initial_scale_power": 4}
        options = {"lr": 1e-2, **recipe.options}
        name = f"dist_optim.{recipe.name}" if recipe.name in NAMES_OF_BOTH else recipe.name
        self.engine = engine_of(ZeroRun(name, options, strategy.stage, strategy.zero, config, make_model=recipe.start))
        self.optimizer = self.engine.basic_optimizer
        self.schedule = _schedule(self.engine.optimizer)
        self.given: Values = {}
        for part in self.optimizer.parts():
            part.step_part = functools.partial(self._from_given, part, part.step_part)

    def _from_given(self, part: Any, step_part: Callable[..., None], present: list[bool]) -> None:
        for one in part.placed_parameters():
            if not isinstance(one.layout, Elsewhere):
                given = self.given[one.fqn].to(one.device)
                one.parameter.grad = one.layout.view_of(given, own_rank(one.process_group)).to(one.dtype).clone()
        step_part(present)

    def step(self, at: int) -> None:
        self.given = self.recipe.gradients(at)
        tokens = batch(at)
        self.engine.backward(self.engine(input_ids=tokens, labels=tokens).loss)
        seed_generators(at)
        self.engine.step()
        self.schedule.step()

    def weights(self) -> Values:
        mine = {}
        self.optimizer.checkpoint_view().look()
        for part in self.optimizer.parts():
            for one in part.placed_parameters():
                if not isinstance(one.layout, Elsewhere):
                    mine[one.fqn] = (one.local().detach().cpu().clone(), one.shape, one.layout.is_replicated)
        everyone: list[Any] = [mine]
        if num_ranks() > 1:
            everyone = [None] * num_ranks()
            dist.all_gather_object(everyone, mine)
        return {
            name: local if is_whole else torch.cat([one[name][0].flatten() for one in everyone]).view(shape)
            for name, (local, shape, is_whole) in mine.items()
        }

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.engine, self.engine.optimizer


def _schedule(optimizer: Any) -> Any:
    if not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's wrappers share its groups
        optimizer = getattr(optimizer, "optimizer", optimizer)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def one_process(recipe: Recipe, steps: int = STEPS) -> list[Values]:
    """The weights of one process at the start and after each step."""
    side = strategy("one").side(recipe)
    found = [side.weights()]
    for at in range(steps):
        side.step(at)
        found.append(side.weights())
    return found


def leg(text: str, recipe: Recipe, steps: range, source: Path | None, target: Path | None) -> list[Values]:
    """Load into a run that has gone another way, train, save; the weights at the start and after each step."""
    torch.compiler.set_stance("force_eager")  # torchao compiles a kernel for each shape otherwise, for minutes
    side = strategy(text).side(recipe)
    if source is not None:
        side.step(1000)
        side.load(source)
    found = [side.weights()]
    for at in steps:
        side.step(at)
        found.append(side.weights())
    if target is not None:
        side.save(target)
    return found


def gap(found: list[Values], expected: list[Values]) -> float:
    """The largest difference of any weight."""
    return max(
        (ours[name] - theirs[name]).abs().max().item()
        for ours, theirs in zip(found, expected, strict=True)
        for name in theirs
    )


def recipe_of(name: str, half: str = "") -> Recipe:
    """As docs/zero.md has it measured; with a suffix, or the words "inside backward", inside backward."""
    plain = name.removesuffix(INSIDE)
    options = run_of_name(plain.removesuffix(LAYERWISE), 0).options
    return Recipe(plain, options, half, is_inside=plain != name or plain.endswith(LAYERWISE))


CHAIN = ("one", "zero1:2", "ddp:3", "zero2:3", "fsdp2:2", "zero3:2", "hsdp:4", "zero0:2") + (
    "fsdp1:2",
    "zero3:3",
    "zero2 offload:2",
    "fsdp2:3",
    "zero3 offload:2",
    "ddp:2",
    "zero2:2",
    "one",
)
"""Every strategy, and every stage of ZeRO from and to something else."""
SHORT_CHAIN = ("ddp:2", "zero2:3", "fsdp2:2", "zero3:2", "one", "zero1:2", "fsdp1:2")


LAYERWISE_CHAIN = ("ddp:2", "fsdp2:3", "one", "hsdp:4", "ddp:3", "fsdp2:2")
"""Where updates are made inside backward; under the others of ``SHORT_CHAIN`` the same names step stored gradients."""
INSIDE = " inside backward"
_INSIDE = ("adalomo", "adamw_torch", "flash_adamw", "lomo", "schedule_free_adamw", "sgd")
_LAYERWISE = ("apollo_adamw", "galore_adafactor", "galore_adamw", "galore_adamw_8bit")
INSIDE_NAMES = tuple(f"{name}{INSIDE}" for name in _INSIDE)
LAYERWISE_NAMES = tuple(f"{name}{LAYERWISE}" for name in _LAYERWISE)


def gaps_of_chain(
    recipe: Recipe, chain: tuple[str, ...], pool_of: Callable[[int], RankPool], folder: Path
) -> dict[str, float]:
    """Each strategy loads what the one before has saved, takes a step, and saves: how far that is from one process."""
    expected = pool_of(1).run(one_process, recipe.reference, BREAK + len(chain))[0]
    found, source = {}, None
    for number, text in enumerate(chain):
        steps = range(BREAK) if source is None else range(BREAK + number - 1, BREAK + number)
        target = folder / f"{number}"
        weights = pool_of(strategy(text).num_ranks).run(leg, text, recipe, steps, source, target)[0]
        before = chain[number - 1] if number else "the start"
        found[f"{before} to {text}"] = gap(weights, expected[steps.start : steps.stop + 1])
        source = target
    return found
