"""The scale of fp16 losses goes on where a run goes on under ZeRO that was begun with a ``GradScaler``, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerated import Training, started_by_accelerate
from resuming import prepared_for, train_steps
from test_accelerate_deepspeed import accelerator_of
from trainers import ZERO, Blocks, Job, arguments_of, fresh_accelerate
from zero import ZeroRun

from dist_optim.checkpoint.loss_scale import LossScale
from dist_optim.integrations.deepspeed.checkpoint_view import ZeroView
from dist_optim.integrations.transformers import Trainer
from dist_optim.testing import RankPool

SCALE = 2.0**10
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 2, "loss_scale_window": 100}}
TRAINING = Training("adamw_torch", {"lr": 1e-3})


def scaler_of(scale: float) -> Any:
    """As accelerate makes one for ``mixed_precision="fp16"``, which it does on a GPU only."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)


def state_of(scaler: Any) -> tuple[float, int]:
    """The scale, and the steps since it changed."""
    found = scaler.state_dict()
    return found["scale"], found["_growth_tracker"]


def state_of_engine(engine: Any) -> tuple[float, int]:
    found = engine.optimizer.loss_scaler
    assert found.cur_hysteresis == 2
    return found.cur_scale, found.cur_iter - found.last_overflow_iter - 1


@contextmanager
def by_accelerate(stage: int | None, scale: float) -> Iterator[tuple[Any, ...]]:
    if stage is None:
        with started_by_accelerate("ddp", TRAINING) as accelerator:
            accelerator.scaler = scaler_of(scale)
            yield accelerator, *prepared_for(accelerator, TRAINING)
        return
    run = ZeroRun("adamw_torch", {"lr": 1e-3}, stage, config=FP16, real_batches=True)
    with accelerator_of(run) as accelerator:
        yield accelerator, *prepared_for(accelerator, TRAINING)


def there_and_back(stage: int, folder: Path) -> list[tuple[float, int]]:
    found = []
    with by_accelerate(None, SCALE) as (accelerator, model, optimizer, scheduler):
        train_steps(accelerator, model, optimizer, scheduler, range(3))
        accelerator.save_state(str(folder / "ddp"))
        found.append(state_of(accelerator.scaler))
    with by_accelerate(stage, 1.0) as (accelerator, model, optimizer, scheduler):
        accelerator.load_state(str(folder / "ddp"))
        found.append(state_of_engine(model))
        train_steps(accelerator, model, optimizer, scheduler, range(3, 5))
        accelerator.save_state(str(folder / "zero"))
        found.append(state_of_engine(model))
    with by_accelerate(None, 4.0) as (accelerator, model, optimizer, _):
        accelerator.load_state(str(folder / "zero"))
        assert accelerator.scaler is not None
        found.append(state_of(accelerator.scaler))
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerates_states(stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(there_and_back, stage, tmp_path):
        assert found == [(SCALE, 3), (SCALE, 3), (SCALE, 5), (SCALE, 5)]


def without_taking(folder: Path) -> list[tuple[float, int]]:
    with mock.patch.object(ZeroView, "take_loss_scale"), mock.patch.object(LossScale, "put_into"):
        return there_and_back(2, folder)


def test_control_each_would_begin_with_its_own(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(without_taking, tmp_path):
        assert [scale for scale, _ in found] == [SCALE, 64.0, 64.0, 4.0]


class Scaled(Trainer):
    """With the scaler that fp16 has on a GPU."""

    initial = SCALE

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.is_deepspeed_enabled:
            self.accelerator.scaler = scaler_of(self.initial)


class ScaledOtherwise(Scaled):
    initial = 4.0


def trained(kind: type[Any], folder: Path, steps: int, resume: Path | None, **more: Any) -> tuple[float, int] | None:
    job = Job("adamw_torch", {"save_strategy": "steps", "save_steps": 3, "max_steps": steps}, kind=kind)
    with fresh_accelerate():
        arguments = arguments_of(job, "zero2" if more else "ddp", folder, **more)
        torch.manual_seed(0)
        trainer = kind(job.make_model(), arguments, train_dataset=Blocks())
        trainer.train(resume_from_checkpoint=resume and str(resume))
        if trainer.is_deepspeed_enabled:
            return state_of_engine(trainer.model_wrapped)
        return state_of(trainer.accelerator.scaler) if trainer.accelerator.scaler is not None else None


def through_the_trainer(folder: Path) -> list[tuple[float, int] | None]:
    engine = {"fp16": True, "deepspeed": {**ZERO, **FP16, "zero_optimization": {"stage": 2}}}
    return [
        trained(Scaled, folder / "first", 3, None),
        trained(Scaled, folder / "second", 6, folder / "first" / "checkpoint-3", **engine),
        trained(ScaledOtherwise, folder / "third", 6, folder / "second" / "checkpoint-6"),
        trained(Trainer, folder / "fourth", 3, folder / "first" / "checkpoint-3"),
    ]


def test_the_trainers_checkpoints(two_ranks: RankPool, tmp_path: Path) -> None:
    """Who has no scaler leaves one that was saved alone, where transformers ends with an AttributeError."""
    for found in two_ranks.run(through_the_trainer, tmp_path):
        assert found == [(SCALE, 3), (SCALE, 6), (SCALE, 6), None]
