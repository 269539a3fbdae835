"""trl's trainers of preferences, rewards and policies with the mixin: stock's bits for its names, and ours beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import own_libraries
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from dist_optim.integrations.transformers import DistOptimTrainerMixin, TrainingArguments

trl: Any = pytest.importorskip("trl")

SHAPE: dict[str, int] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 300, "num_hidden_layers": 2, "pad_token_id": 0},
}
PROMPTS = [f"this is text number {number} and" for number in range(16)]
PAIRS = {"chosen": [f"{one} it is good" for one in PROMPTS], "rejected": [f"{one} it is odd" for one in PROMPTS]}


def by_length(completions: list[str], **others: Any) -> list[float]:
    return [float(len(one)) for one in completions]


@dataclass(frozen=True)
class Kind:
    """A trainer of trl, and what it takes."""

    trainer: Any
    arguments: Any
    data: dict[str, list[str]]
    settings: dict[str, Any] = field(default_factory=dict)
    options: Callable[[], dict[str, Any]] = dict
    model: Callable[[], Any] = lambda: LlamaForCausalLM(LlamaConfig(**SHAPE))


KINDS = {
    "DPO": Kind(
        trl.DPOTrainer,
        trl.DPOConfig,
        {"prompt": PROMPTS, "chosen": [" it is good"] * 16, "rejected": [" it is odd"] * 16},
        {"max_length": 48},
        lambda: {"ref_model": LlamaForCausalLM(LlamaConfig(**SHAPE))},
    ),
    "Reward": Kind(
        trl.RewardTrainer,
        trl.RewardConfig,
        PAIRS,
        {"max_length": 48},
        model=lambda: LlamaForSequenceClassification(LlamaConfig(num_labels=1, **SHAPE)),
    ),
    "GRPO": Kind(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"prompt": PROMPTS},
        {"max_completion_length": 6, "num_generations": 2, "per_device_train_batch_size": 2},
        lambda: {"reward_funcs": by_length},
    ),
}


def trained(kind: Kind, directory: Path, is_ours: bool, **settings: Any) -> tuple[dict[str, Tensor], Any]:
    from datasets import Dataset

    from train_data import byte_tokenizer

    trainer_class, arguments_class = kind.trainer, kind.arguments
    if is_ours:
        trainer_class = type("Own", (DistOptimTrainerMixin, trainer_class), {})
        arguments_class = dataclass(type("OwnArguments", (arguments_class, TrainingArguments), {}))
    with own_libraries():
        arguments = arguments_class(
            str(directory),
            **{"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "no", "use_cpu": True, "bf16": False},
            **{"report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4, **kind.settings, **settings},
        )
        torch.manual_seed(0)
        trainer = trainer_class(
            model=kind.model(),
            args=arguments,
            train_dataset=Dataset.from_dict(kind.data),
            processing_class=byte_tokenizer(),
            **kind.options(),
        )
        torch.manual_seed(1)
        trainer.train()
        return {name: one.detach().clone() for name, one in trainer.model.named_parameters()}, trainer.optimizer


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_as_stock_and_with_a_name_of_ours(kind: Kind, tmp_path: Path) -> None:
    stock, _ = trained(kind, tmp_path / "stock", is_ours=False, optim="adamw_torch")
    ours, _ = trained(kind, tmp_path / "ours", is_ours=True, optim="adamw_torch")
    assert stock.keys() == ours.keys() and all(torch.equal(stock[name], ours[name]) for name in stock)
    low_rank: dict[str, Any] = {"optim_target_modules": ["attn", "mlp"], "optim_args": {"update_proj_gap": 2}}
    other, optimizer = trained(kind, tmp_path / "other", is_ours=True, optim="apollo_mini", **low_rank)
    assert optimizer.optimizer.spec.name == "apollo_mini"
    assert any(not torch.equal(other[name], ours[name]) for name in ours)
