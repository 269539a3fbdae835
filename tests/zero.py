"""The body of the DeepSpeed tests: a small Llama through the real engine, named in the JSON, against one process.

``distance`` trains both sides from their own gradients. ZeRO-3 puts an autograd node around every module, and where
three gradients meet (a residual stream, the inputs of query, key and value) they are then summed in another order. The
one process gets such nodes too (``bracketed``), and is equal to the bit; nothing of this is ours. On three ranks the
engine's average rounds otherwise. ``distance_given_gradients`` takes that away: the engine's own averaged gradients go
to the one process, and nothing but the optimizer can differ.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from end_to_end import BATCH, batch, make_llama
from placements import own_group
from torch import Tensor, nn

import dist_optim
from dist_optim.generators import seed_generators
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import num_ranks
from dist_optim.testing import relative_distance

STEPS = 6
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
GALORE = {"target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3, "scale": 0.25}
NO_DECAY = ["model.norm.weight"] + [
    f"model.layers.{layer}.{norm}.weight"
    for layer in range(2)
    for norm in ("input_layernorm", "post_attention_layernorm")
]


@dataclass(frozen=True)
class ZeroRun:
    """One optimizer under one DeepSpeed configuration."""

    name: str
    options: dict[str, Any]
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    real_batches: bool = False
    make_model: Callable[[], nn.Module] = make_llama
    init: bool = False
    """Build the model under ``zero.Init``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the model that the engine trains."""
        return next((dtype for key, dtype in HALF.items() if key in self.config), torch.float32)

    @property
    def has_masters(self) -> bool:
        return not self.config.get("bf16", {}).get("bf16_master_weights_and_grads", False)

    @property
    def accumulation(self) -> int:
        return self.config.get("gradient_accumulation_steps", 1)

    def json(self) -> dict[str, Any]:
        micro = BATCH // (dist.get_world_size() if self.real_batches else 1) // self.accumulation
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "optimizer": {"type": self.name, "params": self.options},
            **self.config,
        }


def deepspeed() -> Any:
    """The package, quiet, with our names in it, and without its C++ all-reduce, which takes a minute to compile."""
    import deepspeed as package
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    from dist_optim.integrations.deepspeed import register

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    type(get_accelerator()).is_fp16_supported = lambda self: True  # it is slow on the CPU, and right
    register()
    return package


def engine_of(run: ZeroRun) -> Any:
    package = deepspeed()
    if not run.init:
        return package.initialize(model=run.make_model(), config=run.json())[0]
    plain = run.make_model()
    with package.zero.Init(config_dict_or_path={**run.json(), "train_batch_size": BATCH * dist.get_world_size()}):
        model = run.make_model()
    for name, parameter in model.named_parameters():
        with package.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(plain.get_parameter(name).data)
    return package.initialize(model=model, config=run.json())[0]


def parts_of(run: ZeroRun, step: int) -> list[Tensor]:
    """What this rank passes through the model in one training step, one backward each."""
    own = batch(step).chunk(dist.get_world_size())[dist.get_rank()] if run.real_batches else batch(step)
    return list(own.chunk(run.accumulation))


def train_engine(engine: Any, run: ZeroRun, steps: range = range(STEPS)) -> None:
    for step in steps:
        for part in parts_of(run, step):
            engine.backward(loss_of(engine, part, step))
            engine.step()


def loss_of(model: Any, part: Tensor, step: int) -> Tensor:
    takes_step = isinstance(getattr(model, "module", model), SometimesIdle)
    return model(part, step) if takes_step else model(input_ids=part, labels=part).loss


class SometimesIdle(nn.Module):
    """A layer that takes part in every second step only, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(129, 24)
        self.idle = nn.Linear(24, 24)
        self.never = nn.Linear(24, 9)
        self.head = nn.Linear(24, 129)

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        hidden = self.embed(tokens)
        if step % 2 == 0:
            hidden = hidden + self.idle(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens.flatten())


def make_frozen_tied() -> nn.Module:
    """A Llama whose head is its embedding, with frozen parameters before and between the trained ones."""
    model = make_llama()
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.self_attn.k_proj" not in name and "layers.1.mlp.up_proj" not in name)
    return model


def weights_of(engine: Any, run: ZeroRun) -> list[Tensor]:
    parameters = list(engine.module.parameters())
    with deepspeed().zero.GatheredParameters(parameters, enabled=run.stage == 3):
        return [p.detach().float().clone() for p in parameters]


class _Node(torch.autograd.Function):
    """Changes nothing, and is a node in the graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _through_node(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Node.apply(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_through_node, value))
    if isinstance(value, dict):
        for key in value:
            value[key] = _through_node(value[key])
    return value


def bracketed(model: nn.Module) -> nn.Module:
    """The model with ZeRO-3's shape of the graph: a node before and after each module."""
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, arguments: _through_node(arguments))
        module.register_forward_hook(lambda _, arguments, output: _through_node(output))
    return model


class Reference:
    """The same run in one process: the weights that the optimizer steps, in fp32 where the engine has such masters."""

    def __init__(self, run: ZeroRun) -> None:
        self.run = run
        self.model = run.make_model()
        if run.stage == 3:
            bracketed(self.model)
        self.model = self.model.to(run.dtype)
        if run.has_masters:
            self.model = self.model.float()  # masters start from the rounded weights
        name = run.name.removeprefix("dist_optim.")
        self.optimizer = dist_optim.build_optimizer(
            self.model, name, process_group=own_group(), print_audit=False, fused_backward=False, **run.options
        )
        self.optimizer.train()

    def train(self) -> Reference:
        for step in range(STEPS):
            self.train_step(step)
        return self

    def train_step(self, step: int) -> None:
        """One step from its own gradients."""
        whole = [batch(step)] if not self.run.real_batches else batch(step).chunk(dist.get_world_size())
        parts = [part for own in whole for part in own.chunk(self.run.accumulation)]
        for part in parts:
            (loss_of(self.model, part, step) / len(parts)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def follow(self, gradients: dict[str, Tensor | None]) -> None:
        """One step with these gradients."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients.get(name)
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().to(self.run.dtype).float().clone() for p in self.model.parameters()]


class Recorder:
    """Notes the full gradients that the engine hands to the optimizer, put together from all ranks' slices."""

    def __init__(self, engine: Any) -> None:
        self.gradients: dict[str, Tensor | None] = {}
        for part in engine.basic_optimizer.parts():
            part.step_part = functools.partial(self._note, part, part.step_part)

    def _note(self, part: dist_optim.DistributedOptimizer, step_part: Callable[..., None], present: list[bool]) -> None:
        group = part.holdings.process_group
        for placed in {one.whole().fqn: one.whole() for one in part.placed_parameters()}.values():
            if isinstance(placed.layout, Elsewhere):
                continue
            own = placed.local_gradient()
            gathered: list[Any] = [None] * num_ranks(group)
            if num_ranks(group) > 1:
                dist.all_gather_object(gathered, own, group=group)
            else:
                gathered = [own]
            slices = [piece.flatten() for piece in gathered if piece is not None]
            self.gradients[placed.fqn] = torch.cat(slices).view(placed.shape) if slices else None
        step_part(present)


def start_of(run: ZeroRun) -> list[Tensor]:
    return [p.detach().float() for p in run.make_model().to(run.dtype).parameters()]


def distance(run: ZeroRun) -> float:
    """How far the engine's weights end from those of one process, in units of the way travelled."""
    expected = Reference(run).train().weights()
    engine = engine_of(run)
    train_engine(engine, run)
    return relative_distance(weights_of(engine, run), expected, start_of(run))


def distance_given_gradients(run: ZeroRun) -> float:
    """The same, with the engine's own gradients given to the one process: no summation order is left to differ."""
    reference = Reference(run)
    engine = engine_of(run)
    recorder, taken = Recorder(engine), 0
    for step in range(STEPS):
        seed_generators(step)
        train_engine(engine, run, range(step, step + 1))
        if engine.basic_optimizer.num_steps > taken:  # else fp16 overflowed, and the step was skipped
            seed_generators(step)
            reference.follow(recorder.gradients)
            taken += 1
    assert engine.basic_optimizer.num_steps == taken == STEPS - engine.skipped_steps > 0
    return relative_distance(weights_of(engine, run), reference.weights(), start_of(run))


def elements_moved(run: ZeroRun) -> tuple[int, int]:
    """Elements that the ranks send each other in one way of a step, and the largest that a cut could make them send."""
    optimizer = engine_of(run).basic_optimizer
    sent = largest = 0
    for part in optimizer.parts():
        for bucket in part.plan.buckets:
            for rank, _ in enumerate(bucket.owned):
                to_owners = bucket.route(rank).to_owners
                sent += sum(to_owners) - to_owners[rank]
        largest += max((item.shape.numel() for bucket in part.plan.buckets for item in bucket.items), default=0)
    return sent, largest * (dist.get_world_size() - 1)


def bytes_of_state(run: ZeroRun) -> tuple[int, int]:
    """State that this rank holds after a step, and all of it in one process."""
    engine = engine_of(run)
    train_engine(engine, run, range(1))
    reference = Reference(run)
    for parameter in reference.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    reference.optimizer.step()
    return engine.basic_optimizer.optimizer_state_bytes(), reference.optimizer.optimizer_state_bytes()


def distances_of_evaluation(run: ZeroRun) -> list[float]:
    """For weight-swapping optimizers: the model's weights after ``eval()``, and after training on."""
    reference = Reference(run)
    engine = engine_of(run)
    recorder, optimizer = Recorder(engine), engine.basic_optimizer
    found = []
    for step in range(STEPS):
        train_engine(engine, run, range(step, step + 1))
        reference.follow(recorder.gradients)
        if step in (2, STEPS - 1):
            for mode in ("eval", "train"):
                getattr(optimizer, mode)()
                getattr(reference.optimizer, mode)()
                found.append(relative_distance(weights_of(engine, run), reference.weights(), start_of(run)))
    return found


def distance_after_resume(run: ZeroRun, directory: str) -> float:
    """Train, save through the engine, load into a new engine, train on: against the run that was never interrupted."""
    straight = engine_of(run)
    train_engine(straight, run)
    first = engine_of(run)
    train_engine(first, run, range(STEPS // 2))
    first.save_checkpoint(directory, tag="half")
    second = engine_of(run)
    second.load_checkpoint(directory, tag="half")
    train_engine(second, run, range(STEPS // 2, STEPS))
    return relative_distance(weights_of(second, run), weights_of(straight, run), start_of(run))
