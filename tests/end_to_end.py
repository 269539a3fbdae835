"""The end-to-end body: a small Llama of odd sizes through the real engine, against one process on the same batch.

The noise floor is measured, not assumed: how far apart two one-process runs end that differ only in the order in which
the same batch is summed. A distributed run sums in yet another order, so it may be that far off, and no farther.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from parity import full_parameters, place
from torch import Tensor, nn

import dist_optim
from dist_optim.testing import relative_distance

STEPS = 10
BATCH = 12
LENGTH = 16
VOCABULARY = 129


@dataclass(frozen=True)
class Run:
    """One optimizer, as it is asked for."""

    name: str
    options: dict[str, Any]
    clip: float | None = None


def make_llama() -> nn.Module:
    """Odd sizes: nothing divides by two or three, key and value matrices are wide (one head serves three)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=63,
        intermediate_size=173,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=22,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, run: Run, parts: Callable[[Tensor], Sequence[Tensor]]) -> dict[str, Tensor]:
    """Train on this process's parts of each batch, one backward a part; returns the full parameters at the end."""
    optimizer = dist_optim.build_optimizer(model, run.name, print_audit=False, **run.options)
    optimizer.train()
    for step in range(STEPS):
        own = parts(batch(step))
        for at, part in enumerate(own):
            if hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = at == len(own) - 1
            (model(input_ids=part, labels=part).loss / len(own)).backward()
        if run.clip is not None:
            optimizer.clip_grad_norm_(run.clip)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    return full_parameters(model)


def in_equal_parts(count: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda full: list(full.chunk(count))


def distance_and_floor(run: Run, placement: str) -> tuple[float, float]:
    """How far the placed run ends from the one-process run, and the noise floor; relative to the distance moved."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    single = copy.deepcopy(run)
    single.options["process_group"] = alone
    start = list(full_parameters(make_llama()).values())
    reference = list(train(make_llama(), single, in_equal_parts(1)).values())
    floors = []
    for count in (2, 3, 6):
        other = list(train(make_llama(), single, in_equal_parts(count)).values())
        floors.append(relative_distance(other, reference, start))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    placed = place(make_llama(), placement)
    arrived = list(train(placed, run, lambda full: [full.chunk(world_size)[rank]]).values())
    return relative_distance(arrived, reference, start), max(floors)
