"""Save in the middle, resume in a new Trainer: the steps that follow are those of the uninterrupted run, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from trainers import Job, gap_between, train

from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

SAVING = {"save_strategy": "steps", "save_steps": 3}
SCHEDULED = {**SAVING, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "weight_decay": 0.1}


def resume_equals_uninterrupted(name: str, strategies: list[str], directory: str) -> None:
    job = Job(name, SCHEDULED)
    problems = []
    for strategy in strategies:
        first, second = Path(directory) / strategy / "first", Path(directory) / strategy / "second"
        whole = train(job, strategy, first)
        resumed = train(replace(job, resume=str(first / "checkpoint-3")), strategy, second)
        if gap_between(whole, resumed):
            problems.append(f"{strategy}: {gap_between(whole, resumed):.2e} apart after resuming")
        if whole.all("loss")[3:] != resumed.all("loss")[3:] or len(resumed.all("loss")) != 6:
            problems.append(f"{strategy}: losses {whole.all('loss')[3:]} and {resumed.all('loss')[3:]}")
        if [path.name for path in first.iterdir() if path.name.startswith(".")]:
            problems.append(f"{strategy}: unfinished folders are left")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize(
    ("name", "strategies"),
    [
        ("adamw_torch", ["zero2", "fsdp1"]),
        ("galore_adamw", ["ddp", "fsdp1", "fsdp2", "zero3"]),
        ("apollo_adamw", ["ddp", "fsdp2"]),
        ("adafactor", ["fsdp1", "fsdp2"]),
        ("grokadamw", ["ddp", "fsdp2"]),
        ("schedule_free_adamw", ["ddp", "fsdp1", "fsdp2", "zero2"]),
        ("adamw_bnb_8bit", ["ddp", "fsdp2"]),
        ("flash_adamw", ["fsdp1", "fsdp2"]),
        ("stable_adamw", ["fsdp2", "zero1"]),
        ("sgd", ["fsdp2"]),
    ],
)
def test_resumed_training_is_the_uninterrupted_one(
    name: str, strategies: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resume_equals_uninterrupted, name, strategies, str(tmp_path))
