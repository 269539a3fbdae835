"""One process: the weights of transformers' own Trainer to the bit, for every name that it trains right on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from trainers import Job, arguments_of, fresh_accelerate, gap_between, train

import dist_optim

DECAY: dict[str, Any] = {"weight_decay": 0.01, "max_grad_norm": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 2}
NO_DECAY = {**DECAY, "weight_decay": 0.0}
STOCK: dict[str, dict[str, Any]] = {
    "adafactor": DECAY,
    "adagrad": DECAY,
    "adamw_bnb_8bit": DECAY,
    "adamw_torch": {**DECAY, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "adamw_torch_4bit": DECAY,
    "adamw_torch_8bit": DECAY,
    "adamw_torch_fused": DECAY,
    "apollo_adamw": NO_DECAY,
    "galore_adafactor": NO_DECAY,
    "galore_adamw": NO_DECAY,
    "grokadamw": DECAY,
    "lion_8bit": DECAY,
    "rmsprop": {**DECAY, "optim_args": "momentum=0.9,centered=True"},
    "schedule_free_adamw": {**DECAY, "lr_scheduler_type": "constant"},
    "schedule_free_radam": {**DECAY, "lr_scheduler_type": "constant", "warmup_steps": 0},
    "schedule_free_sgd": {**DECAY, "lr_scheduler_type": "constant"},
    "sgd": {**DECAY, "optim_args": "momentum=0.9,nesterov=true"},
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
"""Evaluation at the end, too: schedule-free then leaves its averaged weights, here and there."""


def as_stock(job: Job) -> Job:
    return replace(job, kind=transformers.Trainer)


@pytest.mark.parametrize("name", STOCK)
def test_one_process_equals_transformers_own_trainer(name: str, tmp_path: Path) -> None:
    pytest.importorskip(dist_optim.get_spec(name).load_class().__module__.split(".")[0])
    job = Job(name, {**STOCK[name], **EVALUATED, "gradient_accumulation_steps": 2})
    ours = train(job, "alone", tmp_path / "ours")
    stock = train(as_stock(job), "alone", tmp_path / "stock", transformers.TrainingArguments)
    assert gap_between(ours, stock) == 0
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert ours.all(key) == stock.all(key) != []


def test_control_another_default_is_seen(tmp_path: Path) -> None:
    job = Job("galore_adamw", NO_DECAY)
    ours = train(replace(job, settings={**NO_DECAY, "adam_epsilon": 1e-7}), "alone", tmp_path / "ours")
    stock = train(as_stock(job), "alone", tmp_path / "stock", transformers.TrainingArguments)
    assert gap_between(ours, stock) > 1e-6


def test_the_default_arguments_make_the_same_optimizer(tmp_path: Path) -> None:
    job = Job("adamw_torch")
    with fresh_accelerate():
        given = arguments_of(job, "alone", tmp_path, transformers.TrainingArguments)
        ours = arguments_of(job, "alone", tmp_path)
        assert ours.allow_changed is None and ours.verify_steps == 0 and not ours.asynchronous_saves  # stock has none
        own = ("logging_dir", "allow_changed", "verify_steps", "asynchronous_saves")
        assert {key: value for key, value in ours.to_dict().items() if key not in own} == {
            key: value for key, value in given.to_dict().items() if key != "logging_dir"
        }
