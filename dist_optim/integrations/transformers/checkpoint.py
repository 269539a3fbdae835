"""Saving and resuming in the Trainer: checkpoints that appear whole, with the optimizer's state by logical names.

::

    checkpoint-500/optimizer/        the optimizer (``dist_optim.checkpoint``), whatever the strategy
    checkpoint-500/model.safetensors and all else as transformers writes it; averaged weights of optimizers that average

Under DeepSpeed the engine saves model and optimizer its own way.

transformers writes one piece after another, most of them on rank 0 alone, with collectives in between. Each piece that
such a collective follows is an attempt of all ranks, so that none goes on to wait for one that has failed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_optim.checkpoint import exported_weights, load_optimizer, save_optimizer
from dist_optim.checkpoint.directory import attempt, recover, written_aside
from dist_optim.errors import CheckpointError
from dist_optim.integrations.transformers.whole_weights import install_whole_weights, whole_weights_in
from dist_optim.specs.unwrapping import find_optimizer
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["CheckpointingMixin"]

OPTIMIZER_FOLDER = "optimizer"
CHECKPOINTS = "checkpoint-*"
STATE_FILE, SCHEDULER_FILE = "trainer_state.json", "scheduler.pt"


class CheckpointingMixin:
    """The Trainer's methods that write and read checkpoints. All of them are collective."""

    # transformers' own attributes that are used here and in the mixin; mypy does not follow transformers.
    args: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    control: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _saving_into: Path | None = None

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """As in transformers, which takes one step too many where a run resumes at its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*positional, **named)  # type: ignore[misc]

    # Whole or not at all -----------------------------------------------------------------------------------------

    def train(self, *positional: Any, **named: Any) -> Any:
        """As in transformers; what a killed job has left between two names is there to resume from, or gone."""
        folder = Path(self.args.output_dir)
        attempt(lambda: recover(folder, CHECKPOINTS) if self.args.should_save else None, folder, None)
        return super().train(*positional, **named)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_into or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_deepspeed_enabled:
            self.optimizer.eval()  # the engine saves what is in place
        run = Path(self._get_output_dir(trial))
        directory = run / f"checkpoint-{self.state.global_step}"
        if self.args.push_to_hub:  # the upload goes on in the background, from where it was written
            attempt(functools.partial(super()._save_checkpoint, model, trial), directory, None)  # type: ignore[misc]
            return
        with written_aside(directory, None) as aside:
            self._saving_into = aside.parent  # where transformers makes a folder of the same name
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self._name_the_best(aside, directory)
            finally:
                self._saving_into = None
        attempt(lambda: self._rotate(run) if self.args.should_save else None, directory, None)

    def _name_the_best(self, aside: Path, directory: Path) -> None:
        """The best model's folder, where this is it, by the name that it will have."""
        if self.state.best_model_checkpoint == str(aside):
            self.state.best_model_checkpoint = str(directory)
            if self.args.should_save:
                self.state.save_to_json(str(aside / STATE_FILE))

    def _rotate(self, run: Path) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    # Weights ------------------------------------------------------------------------------------------------------

    def save_model(self, *positional: Any, **named: Any) -> None:
        """As in transformers; the averaged weights of an optimizer that averages, then on all ranks together."""
        optimizer = find_optimizer(self.optimizer, DistributedOptimizer)
        if optimizer is not None:
            with exported_weights(optimizer):
                self._save_weights(*positional, **named)
            return
        if self.is_deepspeed_enabled and self.optimizer is not None:
            self.optimizer.eval()
        self._save_weights(*positional, **named)

    def _save_weights(self, *positional: Any, **named: Any) -> None:
        save = functools.partial(super().save_model, *positional, **named)  # type: ignore[misc]
        if named.get("_internal_call"):  # of a checkpoint: other ranks go on to its collectives
            attempt(save, Path(self.args.output_dir), None)
        else:  # scripts call it on rank 0 alone
            save()

    def _finalize_training(self, *positional: Any, **named: Any) -> Any:
        """Weights that average end averaged; the best model's are such, and must not be averaged again."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        return super()._finalize_training(*positional, **named)  # type: ignore[misc]

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """As in transformers; FSDP also takes the whole tensors that any strategy has saved."""
        files = whole_weights_in(checkpoint)
        if self.is_fsdp_enabled and files:
            install_whole_weights(files, self.model if model is None else model)
            return
        super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_fsdp_enabled and whole_weights_in(best):
            self._load_from_checkpoint(best)
            return
        super()._load_best_model()  # type: ignore[misc]

    # Optimizer and schedule ---------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, folder = find_optimizer(self.optimizer, DistributedOptimizer), Path(output_dir)
        if optimizer is None:
            attempt(functools.partial(super()._save_optimizer_and_scheduler, output_dir), folder, None)  # type: ignore[misc]
            return
        if self.is_fsdp_enabled:
            with exported_weights(optimizer):
                attempt(lambda: self._save_fsdp_weights(output_dir), folder, None)
        save_optimizer(folder / OPTIMIZER_FOLDER, optimizer)
        attempt(lambda: self._save_schedule(folder) if self.args.should_save else None, folder, None)

    def _save_schedule(self, folder: Path) -> None:
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)

    def _save_fsdp_weights(self, output_dir: str) -> None:
        """In accelerate's format, where `save_model` has not written whole tensors: those load under any strategy."""
        from accelerate.utils import save_fsdp_model
        from transformers.trainer import get_fsdp_ckpt_kwargs

        plugin = self.accelerator.state.fsdp_plugin
        if "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return
        save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = find_optimizer(self.optimizer, DistributedOptimizer)
        if checkpoint is None or optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        folder, schedule = Path(checkpoint) / OPTIMIZER_FOLDER, Path(checkpoint) / SCHEDULER_FILE
        if not folder.exists() and not schedule.exists():
            if self.args.should_log:
                print(f"{checkpoint} holds a model alone (save_only_model): optimizer and schedule start afresh.")
            return
        if not folder.exists():
            raise CheckpointError(
                f"{checkpoint} was saved without dist_optim: it has no folder {OPTIMIZER_FOLDER!r}. Resume it with the "
                "Trainer that saved it, or train from its weights: from_pretrained(checkpoint)."
            )
        load_optimizer(folder, optimizer)
        attempt(lambda: self._load_schedule(schedule), Path(checkpoint), None, is_reading=True)

    def _load_schedule(self, path: Path) -> None:
        self.lr_scheduler.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
