"""Muon with AdamW, SOAP and Prodigy, end to end through every door and strategy: within one process's noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerated import Training, alone, through_accelerate
from end_to_end import make_llama
from torch import Tensor
from trainers import Job, train
from zero import ZeroRun, engine_of, train_engine, weights_of
from zero_names import NAMES_OF_BOTH

from dist_optim.testing import RankPool, assert_no_problems_on_any_rank, relative_distance

OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 1e-2},
    "soap": {"lr": 1e-2, "precondition_frequency": 3},
    "prodigy": {"lr": 1.0},
}
STEPS = 6
LIMIT = 0.8
"""SOAP's noise is 0.6 of the way (rounding turns its eigenvectors), and twice that would let anything pass."""


def floor_of(training: Training, reference: list[Tensor], start: list[Tensor]) -> float:
    """How far one process is from itself, where a batch is cut and summed otherwise."""
    return max(relative_distance(alone(training, parts).weights, reference, start) for parts in (2, 3, 6))


def through_the_trainer(name: str, strategy: str, directory: str) -> list[Tensor]:
    settings = {"learning_rate": OPTIONS[name]["lr"]}
    more = {key: value for key, value in OPTIONS[name].items() if key != "lr"}
    if more:
        settings["optim_args"] = more
    found = train(Job(name, settings), strategy, Path(directory) / f"{name} {strategy}")
    return [found.weights[fqn] for fqn, _ in make_llama().named_parameters()]


def by_json(name: str, stage: int) -> list[Tensor]:
    wanted = f"dist_optim.{name}" if name in NAMES_OF_BOTH else name
    run = ZeroRun(wanted, OPTIONS[name], stage, real_batches=True)
    engine = engine_of(run)
    train_engine(engine, run, range(STEPS))
    return weights_of(engine, run)


def are_within_the_floor(name: str, by_trainer: list[str], by_prepare: list[str], stages: list[int], at: str) -> None:
    training = replace(Training(name, OPTIONS[name]), steps=STEPS)
    start = [p.detach() for p in make_llama().parameters()]
    reference = alone(training).weights
    limit = min(2 * floor_of(training, reference, start), LIMIT)
    other = alone(replace(training, name="adamw_torch", options={"lr": 1e-2})).weights
    assert relative_distance(other, reference, start) > limit, "control: another algorithm would not be noticed"
    found = {f"Trainer, {strategy}": through_the_trainer(name, strategy, at) for strategy in by_trainer}
    found |= {f"prepare, {strategy}": through_accelerate(training, strategy).weights for strategy in by_prepare}
    found |= {f"JSON, stage {stage}": by_json(name, stage) for stage in stages}
    distances = {door: relative_distance(weights, reference, start) for door, weights in found.items()}
    problems = [f"{door}: {one:.1e}, limit {limit:.1e}" for door, one in distances.items() if one > limit]
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_door_and_strategy_is_within_the_floor(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    trainer = ["ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"]
    two_ranks.run(are_within_the_floor, name, trainer, ["ddp", "fsdp1", "fsdp2"], [1, 2, 3], str(tmp_path))


@pytest.mark.parametrize("name", OPTIONS)
def test_hsdp_is_within_the_floor(name: str, four_ranks: RankPool, tmp_path: Path) -> None:
    four_ranks.run(are_within_the_floor, name, ["hsdp"], ["hsdp"], [], str(tmp_path))
