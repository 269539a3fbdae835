"""A Trainer's first save, rehearsed: after its first step it is saved, loaded again, compared, and removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dist_optim.checkpoint import save_checkpoint
from dist_optim.checkpoint.engine_view import is_ours

__all__ = ["RehearsedSave"]


class RehearsedSave(TrainerCallback):
    """For a run that will save: what would fail at the first checkpoint, or at resuming from it, fails after a step.

    It takes one save, one load and twice this rank's state, once.

    Raises:
        CheckpointError: On all ranks: from ``trainer.train()``, after the first step.
    """

    def __init__(self) -> None:
        self._is_done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
        will_save = getattr(args.save_strategy, "value", args.save_strategy) != "no"
        if self._is_done or not will_save or not is_ours(held["optimizer"]):
            return
        self._is_done = True
        folder = Path(args.output_dir) / ".rehearsal"
        save_checkpoint(folder, held["model"], held["optimizer"], rehearse=True)
        if args.should_save:
            shutil.rmtree(folder)
