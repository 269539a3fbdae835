"""Saving and resuming in the Trainer: checkpoints that appear whole, with the optimizer's state by logical names.

::

    checkpoint-500/optimizer/        the optimizer (``dist_optim.checkpoint``), whatever the strategy
    checkpoint-500/model.safetensors and all else as transformers writes it; averaged weights of optimizers that average
    checkpoint-500/dist_optim_weights/   the weights, where ZeRO-3 was not told to gather them for saving
    checkpoint-500/dist_optim_save.json  what binds all of it into one save (``checkpoint.folder_seal``)

What one strategy has saved, every other resumes from. Of a model of peft, the adapters are saved in place of the model;
with those of transformers' ``add_adapter``, DeepSpeed saves its own way.

transformers writes one piece after another, most of them on rank 0 alone, with collectives in between. Each piece that
such a collective follows is an attempt of all ranks, so that none goes on to wait for one that has failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_optim.checkpoint import exported_weights, load_optimizer, save_optimizer
from dist_optim.checkpoint.beside_training import begin, write_beside
from dist_optim.checkpoint.build_values import RATE, let_follow
from dist_optim.checkpoint.directory import attempt, begin_aside, ended_aside, filled_aside, recover, written_aside
from dist_optim.checkpoint.engine_view import is_ours, view_of
from dist_optim.checkpoint.folder_seal import (
    MARK,
    PARTS,
    check_folder,
    parts_among,
    seal_again,
    seal_alone,
    seal_folder,
)
from dist_optim.checkpoint.loss_scale import SCALER_FILE, go_on_with_engines, of_file
from dist_optim.checkpoint.model_weights import find_weights
from dist_optim.checkpoint.optimizer_state import copied_optimizer
from dist_optim.checkpoint.plain_loads import plain_loads
from dist_optim.errors import CheckpointError
from dist_optim.integrations.transformers.adapters import stored_adapters
from dist_optim.integrations.transformers.arguments import listed
from dist_optim.integrations.transformers.beside_training import (
    Announcement,
    DeferredWrites,
    on_save_kept_back,
    settle_saves,
)
from dist_optim.integrations.transformers.checkpoint_weights import WeightsMixin
from dist_optim.integrations.transformers.history import checkpoints_in, remove_older
from dist_optim.ranks.agreement import gather_objects

__all__ = ["CheckpointingMixin"]

OPTIMIZER_FOLDER = "optimizer"
CHECKPOINTS = "checkpoint-*"
STATE_FILE, SCHEDULER_FILE = "trainer_state.json", "scheduler.pt"
ENGINES_OWN = "global_step*"
"""Folders of DeepSpeed's own checkpoints."""


class CheckpointingMixin(WeightsMixin):
    """The Trainer's methods that write and read checkpoints. All of them are collective."""

    # transformers' own attributes that are used here and in the mixin, as in `WeightsMixin`.
    lr_scheduler: Any
    control: Any
    _saving_into: Path | None = None
    _saved_into: Path | None = None
    _announcement: Announcement | None = None

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """As in transformers, which takes one step too many where a run resumes at its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*positional, **named)  # type: ignore[misc]

    # Whole or not at all -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *positional: Any, **named: Any) -> Any:
        """As in transformers; what a killed job has left between two names is there to resume from, or gone.

        ``resume_from_checkpoint=True`` is the checkpoint that was saved last, whatever its number. One whose files are
        not all of one save is refused, before anything is changed.
        """
        folder = Path(self.args.output_dir)
        if self._saves_beside():
            self._announcement = None  # of a training that ended in an error
            settle_saves(self)
        attempt(lambda: recover(folder, CHECKPOINTS) if self.args.should_save else None, folder, None)
        if resume_from_checkpoint is True:
            latest = [str(path) for path in attempt(lambda: checkpoints_in(folder), folder, None)[-1:]]
            resume_from_checkpoint = next(iter(gather_objects(latest)[0]), True)  # transformers says that there is none
        if isinstance(resume_from_checkpoint, (str, Path)):
            self._check_sealed(Path(resume_from_checkpoint), *PARTS)
        return super().train(resume_from_checkpoint, *positional, **named)  # type: ignore[misc]

    def _check_sealed(self, checkpoint: Path, *parts: str) -> None:
        """Refuse one that is no longer what was saved. Collective."""
        allowed = parts_among(self._allowed_to_change())[0]
        check_folder(checkpoint, allowed=allowed, only=parts, and_tensors="optimizer" in parts)

    def _allowed_to_change(self) -> list[str]:
        return listed(getattr(self.args, "allow_changed", None))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_into or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_deepspeed_enabled and not self._saves_logically():
            self.optimizer.eval()  # the engine saves what is in place
        run = Path(self._get_output_dir(trial))
        directory = run / f"checkpoint-{self.state.global_step}"
        save = functools.partial(super()._save_checkpoint, model, trial)  # type: ignore[misc]
        if self.args.push_to_hub:  # the upload goes on in the background, from where it was written
            attempt(save, directory, None)
            return
        if self._saves_beside():
            self._save_beside(save, directory)
        else:
            with written_aside(directory, None) as aside:
                self._fill(aside, directory, save)
                seal_folder(aside)
            best = self.state.best_model_checkpoint
            attempt(lambda: self._rotate(run, best) if self.args.should_save else None, directory, None)
        self._saved_into = directory

    def _fill(self, aside: Path, directory: Path, save: Callable[[], None]) -> None:
        self._saving_into = aside.parent  # where transformers makes a folder of the same name
        try:
            attempt(save, directory, None)
            attempt(lambda: self._name_the_best(aside, directory), directory, None)
        finally:
            self._saving_into = None

    def _saves_beside(self) -> bool:
        return bool(getattr(self.args, "asynchronous_saves", False))

    def _save_beside(self, save: Callable[[], None], directory: Path) -> None:
        """Copy what is large, and let a thread write it (``beside_training``)."""
        view = view_of(self.optimizer)
        settle_saves(self)
        begin("a save beside the training", view)
        begin_aside(directory, None)
        self._deferred = deferred = DeferredWrites()
        try:
            with filled_aside(directory, None) as aside:
                self._fill(aside, directory, save)
        finally:
            self._deferred = None
        best, is_first = self.state.best_model_checkpoint, self.args.should_save

        def write(ranks: dist.ProcessGroup | None) -> None:
            with ended_aside(directory, ranks) as aside:
                deferred.write(aside, ranks)
                seal_folder(aside, ranks)
            attempt(lambda: self._rotate(directory.parent, best) if is_first else None, directory, ranks)

        write_beside(write, directory, view.ranks)

    def _maybe_log_save_evaluate(self, *positional: Any, **named: Any) -> None:
        """As in transformers, whose callbacks may change the folder in ``on_save``: some keep the adapters alone."""
        do = functools.partial(super()._maybe_log_save_evaluate, *positional, **named)  # type: ignore[misc]
        if self._saves_beside():
            with on_save_kept_back(self):
                do()
            return
        do()
        saved, self._saved_into = self._saved_into, None
        if saved is not None:
            self._seal_again(saved)

    def _seal_again(self, saved: Path) -> None:
        """After callbacks. Collective."""
        attempt(lambda: seal_again(saved) if self.args.should_save and (saved / MARK).exists() else None, saved, None)

    def _name_the_best(self, aside: Path, directory: Path) -> None:
        """The best model's folder, where this is it, by the name that it will have."""
        if self.state.best_model_checkpoint == str(aside):
            self.state.best_model_checkpoint = str(directory)
            if self.args.should_save:
                self.state.save_to_json(str(aside / STATE_FILE))

    def _save_scaler(self, output_dir: str) -> None:
        attempt(functools.partial(super()._save_scaler, output_dir), Path(output_dir), None)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        attempt(functools.partial(super()._save_rng_state, output_dir), Path(output_dir), None)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in transformers, which uploads the folder from here on: all ranks have written into it."""
        if self.args.should_save:
            seal_alone(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _rotate(self, run: Path, best: str | None) -> None:
        remove_older(run, self.args.save_total_limit, best)

    # The end of training, and DeepSpeed -------------------------------------------------------------------------------

    def _finalize_training(self, *positional: Any, **named: Any) -> Any:
        """Weights that average end averaged; the best model's are such, and must not be averaged again.

        What is saved beside the training is on the disk then.
        """
        if self._saves_beside():
            settle_saves(self)
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        return super()._finalize_training(*positional, **named)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        self._check_sealed(Path(best), "model")
        if self._read_here(best) is not None:
            self._load_from_checkpoint(best)
            return
        with plain_loads():
            super()._load_best_model()  # type: ignore[misc]

    def _is_for_any_engine(self, checkpoint: Any) -> bool:
        """Whether a checkpoint that DeepSpeed's engine is to resume from is one of ours, not one of its own."""
        if not isinstance(checkpoint, str) or not self.is_deepspeed_enabled or self._has_adapters_inside():
            return False
        folder = Path(checkpoint)
        has_weights = find_weights(folder) is not None or stored_adapters(folder, self.model) is not None
        return has_weights and not any(folder.glob(ENGINES_OWN))

    def _resume_under_deepspeed(self, checkpoint: str) -> None:
        """What transformers does under other engines, after the engine was made without the checkpoint.

        Raises:
            CheckpointError: The engine steps by an optimizer of DeepSpeed's own, whose masters nobody would load.
        """
        if not is_ours(self.optimizer):
            raise CheckpointError(
                f"{checkpoint} has no files of DeepSpeed's (global_step...), which its own optimizers resume from. "
                "Train with the optimizer that saved it, or from its weights: from_pretrained(checkpoint)."
            )
        self._load_from_checkpoint(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        self._load_scaler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """As in transformers; what ZeRO and a ``GradScaler`` have saved, each takes from the other."""
        if checkpoint is None:
            return
        folder, load = Path(checkpoint), functools.partial(super()._load_scaler, checkpoint)  # type: ignore[misc]

        def act() -> None:
            scaler = getattr(self.accelerator, "scaler", None)
            if self._is_our_engine():
                if (found := of_file(folder / SCALER_FILE)) is not None:
                    view_of(self.optimizer).take_loss_scale(found)
            elif scaler is not None and (folder / SCALER_FILE).is_file():
                load()
            elif scaler is not None:
                go_on_with_engines(scaler, folder / OPTIMIZER_FOLDER)

        attempt(act, folder, None, is_reading=True)

    # Optimizer and schedule ---------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if not self._saves_logically():
            attempt(functools.partial(super()._save_optimizer_and_scheduler, output_dir), folder, None)  # type: ignore[misc]
            return
        if self.is_fsdp_enabled:
            with exported_weights(self.optimizer):
                self._save_fsdp_weights(folder)
        if self._deferred is None:
            save_optimizer(folder / OPTIMIZER_FOLDER, self.optimizer)
        else:
            self._deferred.together.append(copied_optimizer(folder / OPTIMIZER_FOLDER, self.optimizer))
        attempt(lambda: self._save_schedule(folder) if self.args.should_save else None, folder, None)

    def _save_schedule(self, folder: Path) -> None:
        torch.save(self._schedule().state_dict(), folder / SCHEDULER_FILE)

    def _schedule(self) -> Any:
        """Also the one that DeepSpeed's configuration names, out of accelerate's wrapper, which saves nothing."""
        wraps = type(self.lr_scheduler).__name__ == "DeepSpeedSchedulerWrapper"
        return self.lr_scheduler.scheduler if wraps else self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        is_engines_own = self.is_deepspeed_enabled and not self._is_for_any_engine(checkpoint)
        if checkpoint is None or not is_ours(self.optimizer) or is_engines_own:
            with plain_loads():
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
        allowed = parts_among(self._allowed_to_change())[1]
        load_optimizer(folder, self.optimizer, allow_changed=allowed)
        attempt(lambda: self._load_schedule(schedule, RATE in allowed), Path(checkpoint), None, is_reading=True)

    def _load_schedule(self, path: Path, has_other_rate: bool) -> None:
        self._schedule().load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        if has_other_rate:
            let_follow(self._schedule(), view_of(self.optimizer).optimizer.param_groups)
