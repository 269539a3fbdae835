"""trl's SFTTrainer with the mixin: a name that transformers does not have, saved and resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import fresh_accelerate
from transformers import LlamaConfig, LlamaForCausalLM

from dist_optim.integrations.transformers import DistOptimTrainerMixin, TrainingArguments

trl: Any = pytest.importorskip("trl")


class Tuner(DistOptimTrainerMixin, trl.SFTTrainer):
    pass


@dataclass
class Config(trl.SFTConfig, TrainingArguments):
    pass


def tune(directory: Path, resume: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    from datasets import Dataset

    from train_data import byte_tokenizer

    with fresh_accelerate():
        arguments = Config(
            str(directory),
            optim="apollo_mini",
            optim_target_modules=["attn", "mlp"],
            optim_args={"update_proj_gap": 2},
            learning_rate=1e-2,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            max_length=32,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        trainer = Tuner(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=2, **shape)),
            args=arguments,
            train_dataset=Dataset.from_dict({"text": [f"this is text number {number}" for number in range(64)]}),
            processing_class=byte_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=resume)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return weights, trainer.optimizer.optimizer.spec.name


def test_trls_trainer_takes_every_name_and_resumes(tmp_path: Path) -> None:
    whole, name = tune(tmp_path / "whole")
    assert name == "apollo_mini"
    resumed, _ = tune(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
