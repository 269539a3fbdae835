"""Training through accelerate's own door on the ranks of a pool, and the same training in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ParallelismConfig
from end_to_end import batch, make_llama
from fresh import forget
from placements import full_parameters, own_group
from torch import Tensor, nn

import dist_optim
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate import prepare
from dist_optim.testing import relative_distance

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp1": {**FSDP, "FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": "true"},
    "fsdp2": {**FSDP, "FSDP_VERSION": "2"},
    "hsdp": {**FSDP, "FSDP_VERSION": "2"},
}
"""What ``accelerate launch`` sets for each strategy."""


@dataclass(frozen=True)
class Training:
    """One job: an optimizer and what the loop around it does."""

    name: str
    options: dict[str, Any]
    steps: int = 6
    clip: float | None = None
    accumulation: int = 1
    evaluate_every: int | None = None
    mixed_precision: str = "no"
    is_tied: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    """More of the launcher's environment."""


@dataclass(frozen=True)
class Outcome:
    weights: list[Tensor]
    """Full parameters at the end, as ``optimizer.eval()`` leaves them."""
    evaluations: list[float]


@contextmanager
def started_by_accelerate(
    strategy: str, training: Training | None = None, *, cpu: bool = True
) -> Iterator[Accelerator]:
    """An Accelerator as a rank of ``accelerate launch`` makes it; its process-wide state ends with the context."""
    settings = training.settings if training else {}
    with mock.patch.dict(os.environ, {**ENVIRONMENTS[strategy], **settings}):
        try:
            accelerator = Accelerator(
                cpu=cpu,
                mixed_precision=training.mixed_precision if training else "no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=training.accumulation if training else 1, sync_with_dataloader=False
                ),
            )
            if strategy == "hsdp":
                sizes = ParallelismConfig(dp_replicate_size=2, dp_shard_size=dist.get_world_size() // 2)
                cpu_rehearsal.turn_fsdp_on(accelerator, parallelism_config=sizes)
            yield accelerator
        finally:
            forget()


def make_model(training: Training) -> nn.Module:
    model: Any = make_llama()
    model.config.use_cache = False  # recomputed layers would add to the cache twice
    if training.is_tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def through_accelerate(training: Training, strategy: str, stock: type[torch.optim.Optimizer] | None = None) -> Outcome:
    """Train on this rank's part of each batch; with a ``stock`` optimizer in place of ours, accelerate's usual way."""
    with started_by_accelerate(strategy, training) as accelerator:
        model = make_model(training)
        if stock is None:
            model, optimizer, _ = prepare(accelerator, model, training.name, print_audit=False, **training.options)
        else:
            model, optimizer = prepare_stock(accelerator, model, stock, training.options)
        evaluations = []
        for step in range(training.steps):
            own = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
            for part in own.chunk(training.accumulation):
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=part, labels=part).loss)
                    if accelerator.sync_gradients and training.clip is not None:
                        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip)
                        assert float(norm) > training.clip, "clipping must bind, or it is not tested"
                    optimizer.step()
                    optimizer.zero_grad()
            if training.evaluate_every and step % training.evaluate_every == training.evaluate_every - 1:
                evaluations.append(evaluate(model, optimizer))
        optimizer.eval()
        return Outcome(list(full_parameters(model).values()), evaluations)


def prepare_stock(
    accelerator: Accelerator, model: nn.Module, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """As accelerate's own documentation has it: the optimizer first, then both together, and FSDP1 in two steps."""
    if cpu_rehearsal.is_ignored(accelerator):
        cpu_rehearsal.turn_fsdp_on(accelerator)
    if accelerator.is_fsdp2:
        placed, optimizer = accelerator.prepare(model, kind(model.parameters(), **options))
        return placed, optimizer
    placed = accelerator.prepare_model(model)
    return placed, accelerator.prepare_optimizer(kind(placed.parameters(), **options))


def alone(training: Training, num_parts: int = 1) -> Outcome:
    """The same job in one process, each batch in so many parts."""
    model = make_model(training)
    optimizer = dist_optim.build_optimizer(
        model, training.name, print_audit=False, process_group=own_group(), **training.options
    )
    evaluations = []
    for step in range(training.steps):
        for part in batch(step).chunk(num_parts):
            (model(input_ids=part, labels=part).loss / num_parts).backward()
        if training.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad()
        if training.evaluate_every and step % training.evaluate_every == training.evaluate_every - 1:
            evaluations.append(evaluate(model, optimizer))
    optimizer.eval()
    return Outcome(list(full_parameters(model).values()), evaluations)


@torch.no_grad()
def evaluate(model: nn.Module, optimizer: Any) -> float:
    model.eval()
    optimizer.eval()
    held_out = batch(1000)
    loss = model(input_ids=held_out, labels=held_out).loss.item()
    optimizer.train()
    model.train()
    return loss


@dataclass(frozen=True)
class Distance:
    """How far a run ends from the one-process run, next to how far another order of summation takes that one."""

    weights: float
    weights_floor: float
    evaluations: float
    evaluations_floor: float


def distances(training: Training, strategies: Sequence[str]) -> dict[str, Distance]:
    """For each strategy: its distance to one process, in weights (relative to the way moved) and evaluated losses."""
    start = list(full_parameters(make_model(training)).values())
    reference = alone(training)

    def compare(other: Outcome) -> tuple[float, float]:
        pairs = zip(other.evaluations, reference.evaluations, strict=True)
        gap = max((abs(one - expected) for one, expected in pairs), default=0.0)
        return relative_distance(other.weights, reference.weights, start), gap

    floors = [compare(alone(training, num_parts)) for num_parts in (2, 3, 6)]
    floor, evaluations_floor = (max(values) for values in zip(*floors, strict=True))
    found = {}
    for strategy in strategies:
        weights, evaluations = compare(through_accelerate(training, strategy))
        found[strategy] = Distance(weights, floor, evaluations, evaluations_floor)
    return found
