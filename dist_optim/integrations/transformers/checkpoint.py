"""Saving and resuming in the Trainer: checkpoints that appear whole, with the optimizer's state by logical names.

::

    checkpoint-500/optimizer/        the optimizer (``dist_optim.checkpoint``), whatever the strategy
    checkpoint-500/model.safetensors and all else as transformers writes it; averaged weights of optimizers that average

Under DeepSpeed the engine saves model and optimizer its own way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_optim.checkpoint import exported_weights, load_optimizer, save_optimizer
from dist_optim.errors import CheckpointError
from dist_optim.integrations.transformers.whole_weights import install_whole_weights, whole_weights_in
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["CheckpointingMixin", "distributed_optimizer_of"]

OPTIMIZER_FOLDER = "optimizer"
UNFINISHED = ".unfinished_checkpoint"
STATE_FILE, SCHEDULER_FILE = "trainer_state.json", "scheduler.pt"


def distributed_optimizer_of(optimizer: Any) -> DistributedOptimizer | None:
    """The ``DistributedOptimizer`` inside the Trainer's optimizer; None under DeepSpeed, and where it is no ours."""
    while optimizer is not None and not isinstance(optimizer, DistributedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class CheckpointingMixin:
    """The Trainer's methods that write and read checkpoints. All of them are collective."""

    # transformers' own attributes that are used here and in trainer_mixin; mypy does not follow transformers.
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
    _is_saving = False

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """As in transformers, which takes one step too many where a run resumes at its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*positional, **named)  # type: ignore[misc]

    # Whole or not at all -----------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_deepspeed_enabled:
            self.optimizer.eval()  # the engine saves what is in place
        if self.args.push_to_hub:  # the upload goes on in the background, from where it was written
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        run = Path(self._get_output_dir(trial))
        with self._written_aside(run):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:
            from transformers.trainer_utils import rotate_checkpoints

            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        _wait_for_all()

    @contextmanager
    def _written_aside(self, run: Path) -> Iterator[None]:
        """The checkpoint goes into a folder aside, which is renamed when all ranks have written."""
        aside, name = run / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # of a job that was killed while it saved
        _wait_for_all()
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False
        best = self.state.best_model_checkpoint
        is_best = best is not None and Path(best) == aside / name
        if is_best:
            self.state.best_model_checkpoint = str(run / name)
        _wait_for_all()
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(aside / name / STATE_FILE))
            if (run / name).exists():
                (run / name).rename(aside / "replaced")
            (aside / name).rename(run / name)
            shutil.rmtree(aside, ignore_errors=True)

    # Weights ------------------------------------------------------------------------------------------------------

    def save_model(self, *positional: Any, **named: Any) -> None:
        """As in transformers; the averaged weights of an optimizer that averages. Collective."""
        optimizer = distributed_optimizer_of(self.optimizer)
        if optimizer is not None:
            with exported_weights(optimizer):
                super().save_model(*positional, **named)  # type: ignore[misc]
            return
        if self.is_deepspeed_enabled and self.optimizer is not None:
            self.optimizer.eval()
        super().save_model(*positional, **named)  # type: ignore[misc]

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
        optimizer = distributed_optimizer_of(self.optimizer)
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if self.is_fsdp_enabled:
            with exported_weights(optimizer):
                self._save_fsdp_weights(output_dir)
        save_optimizer(Path(output_dir) / OPTIMIZER_FOLDER, optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _save_fsdp_weights(self, output_dir: str) -> None:
        """In accelerate's format, where `save_model` has not written whole tensors: those load under any strategy."""
        from accelerate.utils import save_fsdp_model
        from transformers.trainer import get_fsdp_ckpt_kwargs

        plugin = self.accelerator.state.fsdp_plugin
        if "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return
        save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = distributed_optimizer_of(self.optimizer)
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
        self.lr_scheduler.load_state_dict(torch.load(schedule, map_location="cpu", weights_only=True))


def _wait_for_all() -> None:
    if num_ranks() > 1:
        dist.barrier()
