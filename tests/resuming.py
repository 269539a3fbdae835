"""A run through accelerate's door that is saved and resumed, against the run that went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerated import Training, make_model, started_by_accelerate
from end_to_end import batch
from placements import full_parameters
from torch import Tensor, nn

from dist_optim.integrations.accelerate import prepare
from dist_optim.testing import assert_equal

__all__ = ["gap_after_resume", "prepared_for", "train_steps"]

BREAK, STEPS = 4, 7


def gap_after_resume(training: Training, strategy: str, directory: Path) -> float:
    """The body: the largest difference of any weight, three steps after ``save_state`` and ``load_state``."""
    with started_by_accelerate(strategy, training) as accelerator:
        model, optimizer, scheduler = prepared_for(accelerator, training)
        train_steps(accelerator, model, optimizer, scheduler, range(BREAK))
        at_the_break = full_parameters(model)
        accelerator.save_state(str(directory))
        assert_equal(full_parameters(model), at_the_break)
        train_steps(accelerator, model, optimizer, scheduler, range(BREAK, STEPS))
        expected, rate = _exported(model, optimizer), scheduler.get_last_lr()
    assert any(not torch.equal(expected[name], at_the_break[name]) for name in expected), "nothing is trained"
    with started_by_accelerate(strategy, training) as accelerator:
        model, optimizer, scheduler = prepared_for(accelerator, training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        accelerator.load_state(str(directory))
        assert_equal(full_parameters(model), at_the_break)
        train_steps(accelerator, model, optimizer, scheduler, range(BREAK, STEPS))
        assert scheduler.get_last_lr() == rate
        resumed = _exported(model, optimizer)
    return max((resumed[name] - expected[name]).abs().max().item() for name in expected)


def prepared_for(accelerator: Accelerator, training: Training) -> tuple[nn.Module, Any, Any]:
    options: dict[str, Any] = {
        "scheduler": "linear",
        "scheduler_options": {"num_training_steps": 10},
        "print_audit": False,
    }
    return prepare(accelerator, make_model(training), training.name, **options, **training.options)


def train_steps(accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        own = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        accelerator.backward(model(input_ids=own, labels=own).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def _exported(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    optimizer.eval()
    return full_parameters(model)
