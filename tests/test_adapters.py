"""A frozen base with small trained parts, as PEFT's LoRA leaves it: what is trained is the small part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end import make_llama
from torch import Tensor, nn
from trainers import Job, Outcome, gap_between, train

from dist_optim.testing import RankPool

RANK = 4


class Adapted(nn.Module):
    """A frozen linear layer, and a product of two thin matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


def make_adapted() -> nn.Module:
    model: Any = make_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    return model


NAMES = ("adamw_torch", "adafactor", "schedule_free_adamw")


def trained(name: str, strategy: str, folder: str) -> Outcome:
    return train(Job(name, make_model=make_adapted), strategy, folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_part_ends_where_one_process_does(
    name: str, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # as on the ranks
    start = make_adapted().state_dict()
    (alone,) = one_rank.run(trained, name, "alone", str(tmp_path / "alone"))
    moved = {key for key, value in alone.weights.items() if not value.equal(start[key])}
    assert moved == {key for key in start if key.endswith((".down", ".up"))}
    for strategy in ("ddp", "fsdp1", "fsdp2"):
        ours = two_ranks.run(trained, name, strategy, str(tmp_path / strategy))[0]
        assert gap_between(ours, alone) < 1e-4, strategy
