"""A small run through the Trainer's and accelerate's doors in one process: trained, saved, resumed, and looked at."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_optim.checkpoint import wait_for_saves
from dist_optim.errors import CheckpointError
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.transformers import Trainer, TrainingArguments

Bits = dict[str, Any]


class Small(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        torch.rand(1)  # a generator that moves
        return {"loss": (self.layers(x) - labels).square().mean()}


ROWS = [{"x": torch.arange(5.0) - row, "labels": torch.ones(3) * row} for row in range(8)]


class Run(ABC):
    """In training; a later one of the same seed is the same run."""

    def __init__(self, home: Path, steps: int, seed: int = 0, **options: Any) -> None:
        self.home, self.model = home, Small(seed)
        self.begin(steps, **options)

    @abstractmethod
    def begin(self, steps: int, **options: Any) -> None:
        """Build, and take the steps."""

    @abstractmethod
    def save(self, home: Path | None = None) -> Path:
        """Save below ``home``, as a user of this door does; where to."""

    @abstractmethod
    def load(self, checkpoint: Path | None) -> None:
        """Resume there; None is the latest."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Any, Any]:
        """Optimizer and schedule."""

    def bits(self) -> Bits:
        """All of it, in copies."""
        optimizer, schedule = self.parts
        found: Bits = {name: one.detach().clone() for name, one in self.model.named_parameters()}
        if optimizer is not None:
            state = optimizer.state_dict()["state"]
            found |= {
                f"{at} {key}": torch.as_tensor(one).clone() for at, own in state.items() for key, one in own.items()
            }
        return found | ({"schedule": repr(schedule.state_dict())} if schedule is not None else {})


class ByTrainer(Run):
    """Checkpoints of the Trainer, by their steps."""

    def begin(self, steps: int, **options: Any) -> None:
        self.trainer = self.made(steps, **options)
        if steps:
            self.trainer.train()

    def made(self, steps: int, **options: Any) -> Any:
        settings = TrainingArguments(
            str(self.home),
            optim="adamw_torch",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_steps=max(steps, 1),
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        return Trainer(self.model, settings, train_dataset=ROWS)

    def save(self, home: Path | None = None) -> Path:
        self.home = self.home if home is None else home
        self.trainer.args.output_dir = str(self.home)
        self.trainer._save_checkpoint(self.trainer.model, None)
        return self.home / f"checkpoint-{self.trainer.state.global_step}"

    def load(self, checkpoint: Path | None) -> None:
        """Resumed at its end, it takes no step."""
        self.trainer.train(resume_from_checkpoint=True if checkpoint is None else str(checkpoint))

    @property
    def parts(self) -> tuple[Any, Any]:
        return self.trainer.optimizer, self.trainer.lr_scheduler


class BesideTraining(ByTrainer):
    """Its folder is written by a thread, which the user of this waits for."""

    def made(self, steps: int, **options: Any) -> Any:
        return super().made(steps, asynchronous_saves=True, **options)

    def save(self, home: Path | None = None) -> Path:
        checkpoint = super().save(home)
        wait_for_saves()
        return checkpoint


class ByAccelerate(Run):
    """``save_state`` into one folder, or into one by its steps."""

    is_numbered = False
    saving: ClassVar[dict[str, Any]] = {}

    def begin(self, steps: int, **options: Any) -> None:
        self.accelerator, self.options = Accelerator(cpu=True), options
        model, self.optimizer, self.schedule = prepare(
            self.accelerator,
            self.model,
            "adamw_torch",
            lr=0.1,
            print_audit=False,
            scheduler="constant",
            scheduler_options={},
        )
        for step in range(steps):
            rows = {key: torch.stack([row[key] for row in ROWS[2 * step :][:2]]) for key in ROWS[0]}
            self.accelerator.backward(model(**rows)["loss"])
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def save(self, home: Path | None = None) -> Path:
        self.home = self.home if home is None else home
        name = f"state-{self.optimizer.optimizer.num_steps}" if self.is_numbered else "state"
        return Path(self.accelerator.save_state(str(self.home / name), **self.saving))

    def load(self, checkpoint: Path | None) -> None:
        self.accelerator.load_state(str(checkpoint or self.home / "state"), **self.options)

    @property
    def parts(self) -> tuple[Any, Any]:
        return self.optimizer, self.schedule


class ByAccelerateEach(ByAccelerate):
    """Each time into a folder of its own; where the latest one does not load, its user takes the one before."""

    is_numbered = True

    def load(self, checkpoint: Path | None) -> None:
        latest = sorted(self.home.glob("state-*"), reverse=True) if checkpoint is None else [checkpoint]
        for path in latest[:-1]:
            with suppress(CheckpointError):
                return super().load(path)
        return super().load(latest[-1])


class BesideAccelerate(ByAccelerateEach):
    """The same, beside the training."""

    saving: ClassVar[dict[str, Any]] = {"asynchronous": True}

    def save(self, home: Path | None = None) -> Path:
        state = super().save(home)
        wait_for_saves()
        return state


DOORS: dict[str, type[Run]] = {"the Trainer": ByTrainer, "accelerate": ByAccelerate}


def equal(one: Bits, other: Bits) -> bool:
    """To the bit."""
    if one.keys() != other.keys():
        return False
    return all(
        torch.equal(one[key], other[key]) if isinstance(one[key], Tensor) else one[key] == other[key] for key in one
    )


def copy_over(source: Path, target: Path) -> None:
    """A file or a folder in the place of another."""
    if target.is_dir():
        shutil.rmtree(target)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
