"""Unset hyperparameters are what transformers' Trainer passes with default TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_optim

transformers = pytest.importorskip("transformers")

MATRIX_KEY = "rank"
SETTLED_AT_CONSTRUCTION = {"params", "train_mode", "kahan_sum", "triton"}
"""What upstream leaves open until its first step, or until train() is called, and what is settled here at once."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 12)
        self.linear = nn.Linear(12, 40)


def trainers_groups(name: str, model: nn.Module, directory: Path) -> list[dict[str, Any]]:
    """The param groups of the optimizer that the Trainer makes, with the model's parameters as one plain group."""
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), optim=name, optim_target_modules="all-linear", report_to=[], use_cpu=True
    )
    optimizer_class, keywords = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups = keywords.pop("params", None) or [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **keywords)
    return optimizer.param_groups


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")  # galore-torch, of itself
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw_torch", "torch"),
        ("adamw_torch_fused", "torch"),
        ("sgd", "torch"),
        ("adagrad", "torch"),
        ("rmsprop", "torch"),
        ("adafactor", "transformers"),
        ("grokadamw", "grokadamw"),
        ("schedule_free_adamw", "schedulefree"),
        ("schedule_free_radam", "schedulefree"),
        ("schedule_free_sgd", "schedulefree"),
        ("stable_adamw", "optimi"),
        ("galore_adamw", "galore_torch"),
        ("galore_adafactor", "galore_torch"),
        ("galore_adamw_8bit", "galore_torch"),
        ("apollo_adamw", "apollo_torch"),
        ("adamw_bnb_8bit", "bitsandbytes"),
        ("lion_8bit", "bitsandbytes"),
    ],
)
def test_unset_hyperparameters_are_the_trainers(name: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    model = Net()
    low_rank = dist_optim.Trait.LOW_RANK in dist_optim.get_spec(name).traits
    targets: dict[str, Any] = {"target_modules": "all-linear"} if low_rank else {}
    ours = dist_optim.build_optimizer(model, name, lr=5e-5, print_audit=False, **targets).param_groups
    kinds = {MATRIX_KEY in group: group for group in trainers_groups(name, model, tmp_path)}
    assert set(kinds) == {MATRIX_KEY in group for group in ours}
    for group in ours:
        theirs = kinds[MATRIX_KEY in group]
        shared = (group.keys() & theirs.keys()) - SETTLED_AT_CONSTRUCTION
        assert {"lr", "weight_decay"} <= shared
        assert {key: group[key] for key in shared} == {key: theirs[key] for key in shared}
        assert theirs.keys() - group.keys() == set()
