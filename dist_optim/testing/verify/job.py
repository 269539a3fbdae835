"""What is verified, as it travels to the ranks; the model, and the gradients of each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.errors import UsageError

__all__ = ["STRATEGIES", "Job", "gradients", "make_model"]

STRATEGIES = ("ddp", "fsdp1", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")
GROWTH = 1.3
"""Factor on the gradients from step to step, so that clips and limiters bind."""
DECAY = 0.9
"""Factor on every learning rate from step to step, as a schedule would."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One verification; plain data, and classes by reference."""

    optimizer: Any
    """A registered name, or a class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of ``build_optimizer``: hyperparameters, ``target_modules``, ``rest``."""
    strategy: str = "ddp"
    ranks: int = 2
    model: str | None = None
    """A config.json that transformers knows; None for a small model of awkward shapes."""
    dtype: str = "float32"
    steps: int = 8
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Of the optimizer."""
        return self.optimizer if isinstance(self.optimizer, str) else self.optimizer.__name__

    @property
    def stage(self) -> int | None:
        """Of ZeRO; None under torch's own strategies."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else None


class Awkward(nn.Module):
    """A small model of shapes chosen to hurt: wide, tall and square matrices, odd sizes, one row, vectors."""

    def __init__(self, linear: Sequence[tuple[int, int]], vectors: Sequence[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(33, 24)
        self.linears = nn.ModuleList(nn.Linear(cols, rows, bias=at % 2 == 0) for at, (rows, cols) in enumerate(linear))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in vectors)
        self.head = nn.Linear(24, 33, bias=False)


LINEAR = ((67, 40), (40, 67), (48, 48), (17, 80), (96, 32))
VECTORS = (33, 5, 1)


def make_model(job: Job) -> nn.Module:
    """The model, with the same weights at every call. Local.

    Raises:
        UsageError: The config describes no model.
    """
    torch.manual_seed(0)
    model = Awkward(LINEAR, VECTORS) if job.model is None else _of_config(job.model)
    return model.to(device=job.device, dtype=DTYPES[job.dtype])


def _of_config(path: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(entries.pop("model_type"), **entries)
        made: nn.Module
        try:
            made = AutoModelForCausalLM.from_config(config)
        except ValueError:  # of another task
            made = AutoModel.from_config(config)
    except Exception as error:  # an odd entry can fail anywhere in the config's or the model's constructor
        raise UsageError(
            f"--model {path!r} describes no model: {type(error).__name__}: {error}. Give a config.json, or its folder, "
            "with a model_type that transformers knows."
        ) from error
    return made


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Whole gradients of one step, by name: the same on every rank; each value fits into bfloat16."""
    generator = torch.Generator("cpu").manual_seed(1000 + step)
    drawn = {
        name: torch.randn(one.shape, generator=generator, device="cpu") * 0.1 * GROWTH**step
        for name, one in model.named_parameters()
        if one.requires_grad
    }
    like = dict(model.named_parameters())
    return {name: one.bfloat16().to(like[name].device, like[name].dtype) for name, one in drawn.items()}
