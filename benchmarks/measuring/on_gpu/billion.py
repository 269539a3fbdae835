"""A Llama of 1.1 billion parameters in bf16 with random weights, and each optimizer on it: upstream's and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from parity import Case, param_groups
from torch import Tensor, nn
from torch.optim import Optimizer

import dist_optim
from measuring.on_gpu.rows import Settings
from measuring.recipes import in_training

__all__ = ["TARGETS", "digest", "give_gradients", "llama", "on_llama", "ours", "upstream"]

LAYERS = "model.layers"
TARGETS = ["attn", "mlp"]
DTYPE = torch.bfloat16
EMBEDDINGS_IN_32_BITS = ("adamw_bnb_8bit", "lion_8bit")
RANK, QUICK_RANK = 128, 8


def llama(settings: Settings) -> nn.Module:
    """The same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    if settings.is_quick:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, attn_implementation="sdpa")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with settings.place:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for number, parameter in enumerate(model.parameters()):
        parameter.place_in_model = number  # type: ignore[attr-defined]  # which references of tests/cases read
    return model


def on_llama(case: Case, settings: Settings) -> Case:
    """The case for this model: its low-rank groups are the layers' matrices, and no projection is refreshed."""
    matrix = dict(case.matrix)
    if matrix:
        rank = QUICK_RANK if settings.is_quick else RANK
        matrix |= {"update_proj_gap": 200, "rank": 1 if matrix["rank"] == 1 else rank}
    return replace(case, matrix=matrix, targets=(LAYERS,), dtype=DTYPE)


def upstream(case: Case, model: nn.Module) -> Optimizer:
    """Unmodified, as the case makes it."""
    named = {name: one for name, one in model.named_parameters() if isinstance(one, nn.Parameter)}
    make = {"muon": muon, "adam_mini": adam_mini}.get(case.name)
    return in_training(make(case, model) if make else case.make_reference(param_groups(case, named)))


def muon(case: Case, model: nn.Module) -> Optimizer:
    """torch's on the layers' matrices, and AdamW on the rest."""
    from parity import Together

    named = dict(model.named_parameters())
    hidden = [one for name, one in named.items() if one.ndim == 2 and name.startswith(LAYERS)]
    head = [one for name, one in named.items() if one.ndim == 2 and not name.startswith(LAYERS)]
    vectors = [one for one in named.values() if one.ndim < 2]
    rest: list[dict[str, Any]] = [{"params": head}, {"params": vectors, "weight_decay": 0.0}]
    return Together(torch.optim.Muon(hidden, **case.hyperparameters), torch.optim.AdamW(rest, **case.hyperparameters))


def adam_mini(case: Case, model: nn.Module) -> Optimizer:
    from pytorch_optimizer import AdamMini

    made: Any = AdamMini(model, **case.hyperparameters)
    return made


def ours(case: Case, model: nn.Module, **options: Any) -> dist_optim.DistributedOptimizer:
    """By name, with the case's hyperparameters."""
    decays = "weight_decay" in case.hyperparameters
    if case.name in EMBEDDINGS_IN_32_BITS:  # by default here, as in the Trainer, and not upstream
        options["optim_bits"] = 8
    options |= {"target_modules": TARGETS} if case.matrix else {}
    if decays and case.name != "adam_mini":
        options["no_decay"] = [name for name, one in model.named_parameters() if one.ndim <= 1]
    optimizer = dist_optim.build_optimizer(
        model, case.name, print_audit=False, **{**case.hyperparameters, **case.matrix, **case.constructor, **options}
    )
    optimizer.train()
    return optimizer


def give_gradients(parameters: Sequence[Tensor], step: int) -> None:
    """Fresh ones: the same at the same step, as is what an optimizer may draw in it."""
    torch.manual_seed(step)
    numpy.random.seed(step)
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, device=device, generator=generator)


def digest(parameters: Sequence[Tensor]) -> list[int]:
    """A sum of bits a tensor: two models that differ have others, in all likelihood."""
    return torch.stack([one.detach().view(torch.int16).sum(dtype=torch.int64) for one in parameters]).tolist()
