"""The end-to-end body: a small Llama of odd sizes through the real engine, against one process on the same batch.

The noise floor is measured, not assumed: how far apart two one-process runs end that differ only in the order in which
the same batch is summed. A distributed run sums in yet another order, so it may be that far off, and no farther.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from placements import full_parameters, own_group, place
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.testing import relative_distance

STEPS = 10
BATCH = 12
LENGTH = 16
VOCABULARY = 129
EVALUATE_EVERY = 2
PARTS = (1, 2, 3, 4, 6, 12)
"""Into how many equal parts the one-process runs cut a batch: the first is the reference, the others give the floor."""


@dataclass(frozen=True)
class Run:
    """One optimizer, as it is asked for."""

    name: str
    options: dict[str, Any]
    clip: float | None = None

    def __str__(self) -> str:
        return self.name + (" clipped" if self.clip else "")


_LOW_RANK = {"target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3}
_DECAY = {"lr": 1e-2, "weight_decay": 0.01}
_PLAIN_FLASH = {**_DECAY, "quantize": False, "fused": False, "master_weight_bits": None}

RUNS = (
    Run("adafactor", _DECAY),
    Run("adagrad", _DECAY),
    Run("adalomo", {**_DECAY, "fused_backward": False}),
    Run("adam_mini", {**_DECAY, "num_embeds": 33, "num_heads": 11}),
    Run("adamw_bnb_8bit", {**_DECAY, "min_8bit_size": 1024}),
    Run("adamw_torch", _DECAY),
    Run("adamw_torch", _DECAY, clip=0.5),
    Run("adamw_torch_4bit", _DECAY),
    Run("adamw_torch_8bit", _DECAY),
    Run("adamw_torch_fused", _DECAY),
    Run("adan", _DECAY),
    Run("adopt", _DECAY),
    Run("apollo_adamw", {**_DECAY, **_LOW_RANK}),
    Run("apollo_mini", {**_DECAY, **_LOW_RANK, "rank": 1}),
    Run("came", {**_DECAY, "lr": 1e-3}),
    Run("flash_adam", _PLAIN_FLASH),
    Run("flash_adamw", _PLAIN_FLASH),
    Run("flash_lion", {**_PLAIN_FLASH, "lr": 1e-3}),
    Run("flash_sgd", {**_PLAIN_FLASH, "lr": 1e-1, "momentum": 0.9}),
    Run("flash_sgdw", {**_PLAIN_FLASH, "lr": 1e-1, "momentum": 0.9}),
    Run("galore_adafactor", {**_DECAY, **_LOW_RANK}),
    Run("galore_adamw", {**_DECAY, **_LOW_RANK}),
    Run("galore_adamw", {**_DECAY, **_LOW_RANK}, clip=0.5),
    Run("galore_adamw_8bit", {**_DECAY, **_LOW_RANK}),
    Run("grokadamw", _DECAY),
    Run("kron", {**_DECAY, "balance_prob": 0.0}),
    Run("lamb", _DECAY),
    Run("lion", {**_DECAY, "lr": 1e-3}),
    Run("lion_8bit", {"lr": 1e-3, "min_8bit_size": 1024}),
    Run("lomo", {"lr": 1e-1, "fused_backward": False}),
    Run("mars", _DECAY),
    Run("muon", {"lr": 1e-2, "rest_options": {"lr": 1e-3}}),
    Run("prodigy", {"lr": 1.0, "weight_decay": 0.01, "d0": 1e-4}),
    Run("rmsprop", {"lr": 1e-3}),
    Run("schedule_free_adamw", _DECAY),
    Run("schedule_free_radam", _DECAY),
    Run("schedule_free_sgd", {"lr": 1e-1}),
    Run("sgd", {"lr": 1e-1, "momentum": 0.9}),
    Run("shampoo", {"lr": 1e-1, "weight_decay": 0.01}),
    Run("soap", {**_DECAY, "precondition_frequency": 3}),
    Run("stable_adamw", _DECAY),
)


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


def train(model: nn.Module, run: Run, parts: Callable[[Tensor], Sequence[Tensor]], **options: Any) -> dict[str, Tensor]:
    """Train on this process's parts of each batch, one backward a part, and evaluate every few steps.

    Returns the full parameters at the end: the averaged ones where the optimizer has such.
    """
    optimizer = dist_optim.build_optimizer(model, run.name, print_audit=False, **run.options, **options)
    optimizer.train()
    for step in range(STEPS):
        own = parts(batch(step))
        for at, part in enumerate(own):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = at == len(own) - 1
            (model(input_ids=part, labels=part).loss / len(own)).backward()
        if run.clip is not None:
            optimizer.clip_grad_norm_(run.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVALUATE_EVERY == 1:
            evaluate(model, optimizer, own[0])
    optimizer.eval()
    return full_parameters(model)


@torch.no_grad()
def evaluate(model: nn.Module, optimizer: dist_optim.DistributedOptimizer, part: Tensor) -> None:
    """A forward pass without backward: engines leave parameters gathered after it, and schedule-free swaps weights."""
    optimizer.eval()
    model.eval()
    model(input_ids=part, labels=part)
    model.train()
    optimizer.train()


def in_equal_parts(count: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda full: list(full.chunk(count))


@dataclass(frozen=True)
class Measured:
    """Relative to the distance that the reference moved: the floor, and how far each placement ended from it."""

    floor: float
    distances: dict[str, float]


PLACEMENTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {},
    "fsdp2": {},
    "hsdp": {},
}


def measure(run: Run, placements: Sequence[str]) -> Measured:
    """Collective: the one-process runs are divided over the ranks, then all train together under each placement."""
    torch.compiler.set_stance("force_eager")  # torchao compiles a kernel for each shape otherwise, for minutes
    rank, world_size = dist.get_rank(), dist.get_world_size()
    start = list(full_parameters(make_llama()).values())
    mine = {
        count: list(train(make_llama(), run, in_equal_parts(count), process_group=own_group()).values())
        for at, count in enumerate(PARTS)
        if at % world_size == rank
    }
    everyones: list[dict[int, list[Tensor]]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyones, mine)
    ended = {count: weights for one in everyones for count, weights in one.items()}
    reference = ended.pop(1)
    distances = {}
    for placement in placements:
        model = place(make_llama(), placement)
        arrived = train(model, run, lambda full: [full.chunk(world_size)[rank]], **PLACEMENTS[placement])
        distances[placement] = relative_distance(list(arrived.values()), reference, start)
    return Measured(max(relative_distance(other, reference, start) for other in ended.values()), distances)
