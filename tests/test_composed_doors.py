"""Several algorithms through the doors of the frameworks: the Trainer's arguments, DeepSpeed's JSON, ``prepare``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerated import Training, started_by_accelerate
from end_to_end import make_llama
from parity import Together
from placements import full_parameters
from resuming import prepared_for, train_steps
from trainers import ZERO, Blocks, Job, arguments_of, fresh_accelerate, gap_between, train

from dist_optim.errors import HyperparameterError, ParameterError
from dist_optim.integrations.transformers import Trainer
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

RATES: dict[str, Any] = {"lr": 1e-2, "rest_options": {"lr": 2e-3, "betas": (0.8, 0.9)}}
PATTERNS: list[dict[str, Any]] = [
    {"params": "*proj*", "optim": "muon"},
    {"params": "*", "optim": "adamw_torch", "lr": 2e-3, "betas": [0.8, 0.9]},
]
WITHOUT_DECAY = [{**group, "weight_decay": 0.0} for group in PATTERNS]
BY_REST = Job("muon", {"optim_args": "rest_lr=2e-3, rest_betas=(0.8, 0.9)", "weight_decay": 0.1})
BY_PATTERN = replace(BY_REST, settings={"optim_args": {"params": PATTERNS}, "weight_decay": 0.1})


class Stock(transformers.Trainer):
    """transformers' own, with torch's optimizers one after the other."""

    def create_optimizer(self, model: Any = None) -> Any:
        decays = set(self.get_decay_parameter_names(self.model))
        named = dict(self.model.named_parameters())
        groups = [
            {
                "params": [named[n] for n in named if "proj" not in n and (n in decays) == decaying],
                "weight_decay": decay,
            }
            for decaying, decay in ((True, 0.1), (False, 0.0))
        ]
        hidden = torch.optim.Muon([one for name, one in named.items() if "proj" in name], lr=1e-2, weight_decay=0.1)
        self.optimizer = Together(hidden, torch.optim.AdamW(groups, lr=2e-3, betas=(0.8, 0.9)))
        return self.optimizer


@pytest.mark.parametrize("job", [BY_REST, BY_PATTERN], ids=["rest", "patterns"])
def test_the_trainer_in_one_process_is_the_stock_one_with_separate_optimizers(job: Job, tmp_path: Path) -> None:
    ours = train(job, "alone", tmp_path / "ours")
    stock = train(Job("adamw_torch", kind=Stock), "alone", tmp_path / "stock", transformers.TrainingArguments)
    assert gap_between(ours, stock) == 0


def trained_alike(directory: str) -> None:
    """Two ranks sum alike under every engine: the same bits, by both ways of asking, and resumed from the middle."""
    folder, problems = Path(directory), []
    expected = train(BY_REST, "ddp", folder / "ddp")
    saving = {"save_strategy": "steps", "save_steps": 3}
    for strategy, job in (("fsdp1", BY_REST), ("fsdp2", BY_PATTERN)):
        job = replace(job, settings={**job.settings, **saving})
        checkpoint = str(folder / strategy / "checkpoint-3")
        for resume in (None, checkpoint):
            found = train(replace(job, resume=resume), strategy, folder / strategy)
            if gap := gap_between(found, expected):
                problems.append(f"{strategy}, resumed from {resume}: {gap}")
    section = {"type": "dist_optim.muon", "params": {"lr": 1e-2, "params": WITHOUT_DECAY}}
    config = {**ZERO, "zero_optimization": {"stage": 2}, "optimizer": section}
    by_json = train(Job("adamw_torch_fused"), "zero2", folder / "json", deepspeed=config)
    by_name = train(Job("muon", {"optim_args": {"params": WITHOUT_DECAY}}), "zero2", folder / "name")
    if gap := gap_between(by_json, by_name):
        problems.append(f"zero2, by its JSON and by name: {gap}")
    assert_no_problems_on_any_rank(problems)


def test_the_trainer_trains_alike_under_every_engine(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(trained_alike, str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"optim_args": {"params": [{"params": "layer.*"}, {"params": "*"}]}}, ParameterError, "matches no parameter"),
        ({"optim_args": {"params": ["*"]}}, ParameterError, "no groups by pattern"),
        ({"optim_args": {"rest_lr": 1e-3, "rest_options": {"lr": 1e-3}}}, HyperparameterError, "in rest_options, and"),
    ],
)
def test_what_the_arguments_cannot_say(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with fresh_accelerate():
        arguments = arguments_of(Job("muon", settings), "alone", tmp_path)
        with pytest.raises(error, match=message):
            Trainer(make_llama(), arguments, train_dataset=Blocks()).create_optimizer()


def test_adams_flags_reach_the_rest(tmp_path: Path) -> None:
    with fresh_accelerate():
        arguments = arguments_of(Job("muon", {"adam_beta2": 0.95}), "alone", tmp_path)
        optimizer = Trainer(make_llama(), arguments, train_dataset=Blocks()).create_optimizer()
    assert optimizer.hyperparameters["rest_options"] == {"betas": (0.9, 0.95)}


def prepared(strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    training = Training("muon", options)
    with started_by_accelerate(strategy, training) as accelerator:
        model, optimizer, scheduler = prepared_for(accelerator, training)
        train_steps(accelerator, model, optimizer, scheduler, range(4))
        return full_parameters(model)


def prepared_alike() -> None:
    expected = prepared("ddp", {**RATES, "weight_decay": 0.0})
    problems = []
    for strategy, options in (
        ("fsdp2", {"lr": 1e-2, "params": WITHOUT_DECAY}),
        ("fsdp1", {**RATES, "weight_decay": 0.0}),
    ):
        found = prepared(strategy, options)
        problems += [f"{strategy}: {name}" for name in expected if not torch.equal(found[name], expected[name])][:3]
    assert_no_problems_on_any_rank(problems)


def test_prepare_takes_both(two_ranks: RankPool) -> None:
    two_ranks.run(prepared_alike)
