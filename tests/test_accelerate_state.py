"""``accelerator.save_state`` and ``load_state`` after ``prepare``: the resumed run is the run that went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerated import Training, make_model, started_by_accelerate
from end_to_end import batch
from placements import full_parameters
from torch import Tensor, nn

from dist_optim.integrations.accelerate import prepare
from dist_optim.testing import RankFailure, RankPool, assert_equal

GALORE = {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3, "scale": 0.25}
RUNS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"lr": 1e-2},
    "galore_adamw": GALORE,
    "schedule_free_adamw": {"lr": 1e-2},
    "grokadamw": {"lr": 1e-2},
    "adafactor": {"lr": 1e-2},
}
BREAK, STEPS = 4, 7


def prepared(accelerator: Accelerator, training: Training) -> tuple[nn.Module, Any, Any]:
    model = make_model(training)
    return prepare(accelerator, model, training.name, scheduler="linear", print_audit=False,
                   scheduler_options={"num_training_steps": 10}, **training.options)  # fmt: skip


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        own = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        accelerator.backward(model(input_ids=own, labels=own).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def exported(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    optimizer.eval()
    return full_parameters(model)


def resume(name: str, strategy: str, directory: Path) -> None:
    training = Training(name, RUNS[name])
    with started_by_accelerate(strategy, training) as accelerator:
        model, optimizer, scheduler = prepared(accelerator, training)
        train(accelerator, model, optimizer, scheduler, range(BREAK))
        at_the_break = full_parameters(model)
        accelerator.save_state(str(directory))
        assert_equal(full_parameters(model), at_the_break)
        train(accelerator, model, optimizer, scheduler, range(BREAK, STEPS))
        expected, rate = exported(model, optimizer), scheduler.get_last_lr()
    with started_by_accelerate(strategy, training) as accelerator:
        model, optimizer, scheduler = prepared(accelerator, training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        accelerator.load_state(str(directory))
        assert_equal(full_parameters(model), at_the_break)
        train(accelerator, model, optimizer, scheduler, range(BREAK, STEPS))
        assert_equal(exported(model, optimizer), expected)
        assert scheduler.get_last_lr() == rate


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    name: str, strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resume, name, strategy, tmp_path / "state")


def resume_by_accelerate_alone(name: str, strategy: str, directory: Path) -> None:
    with mock.patch("dist_optim.integrations.accelerate.serve_state"):
        resume(name, strategy, directory)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_control_accelerates_own_way_loses_the_state(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        two_ranks.run(resume_by_accelerate_alone, "galore_adamw", strategy, tmp_path / "state")
