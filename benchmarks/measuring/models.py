"""The models: matrices of a small Llama for the step alone, many small tensors for what a wrapper costs, a Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "batch_of_tokens", "llama"]

VOCABULARY = 6144
TOKENS = (4, 256)
"""Sequences and tokens in each that a rank trains on in a step: 1,024 tokens."""


class Block(nn.Module):
    """The seven matrices of a Llama's layer, as a small network that can be trained."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = torch.tanh(self.query(hidden)) * torch.tanh(self.key(hidden)) + self.value(hidden)
        hidden = hidden + self.out(mixed)
        return hidden + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


def matrices() -> nn.Module:
    """12.4 million parameters in 49 matrices."""
    return nn.Sequential(*(Block(384, 1024) for _ in range(7)))


def small() -> nn.Module:
    """1.2 million parameters in 600 tensors."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(300)))


def llama() -> nn.Module:
    """Six layers and 8 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=TOKENS[1],
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def batch_of_tokens(device: torch.device) -> Tensor:
    return torch.randint(0, VOCABULARY, TOKENS, device=device)


def tiny() -> nn.Module:
    """Of seven matrices, for tests."""
    return nn.Sequential(Block(12, 32))


MODELS = {"matrices": matrices, "small": small, "tiny": tiny}
