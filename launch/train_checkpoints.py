"""Checkpoints of `launch/train.py`: `OUTPUT_DIR/checkpoint-STEP`, each whole or not there, and how a run goes on.

Every rank calls every function, except for what only reads names.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader

from dist_optim.checkpoint import load_checkpoint, save_checkpoint
from dist_optim.checkpoint.directory import attempt, written_aside
from dist_optim.errors import CheckpointError, DistOptimError
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.ranks.together import raise_together
from train_arguments import UsageError

if TYPE_CHECKING:
    from train_loop import TrainingRun

__all__ = ["checkpoints_in", "endless_batches", "find", "load", "save"]

NAME = re.compile(r"checkpoint-(\d+)")
LAST = "last"
ENGINE_TAG = "engine"


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the latest last."""
    root = Path(output_dir)
    found = [(int(match[1]), path) for path in root.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find(asked: str | None, output_dir: str) -> Path | None:
    """The checkpoint to resume from; ``last`` without any starts from the beginning, for jobs that restart themselves.

    Raises:
        UsageError: The folder does not exist.
    """
    if asked is None:
        return None
    if asked == LAST:
        found = checkpoints_in(output_dir)
        return found[-1] if found else None
    if not Path(asked).is_dir():
        raise UsageError(
            f"--resume_from_checkpoint {asked!r} is not a folder. Give one of {_listed(output_dir)}, or: {LAST}."
        )
    return Path(asked)


def _listed(output_dir: str) -> str:
    found = ", ".join(str(path) for path in checkpoints_in(output_dir))
    return found or f"the checkpoints of a run (there are none in {output_dir!r})"


def save(run: TrainingRun) -> None:
    """Write the run as it is now, then drop the oldest beyond the limit."""
    own = {"progress": run.progress(), "random": _random_state(run.accelerator.device)}
    target = Path(run.arguments.output_dir) / f"checkpoint-{run.step}"
    if run.directory is not None:
        run.directory.drop_stale_checkpoints()
    if run.accelerator.distributed_type is DistributedType.DEEPSPEED:
        _save_engine(run, target, own)
    else:
        save_checkpoint(target, run.model, run.optimizer, run.scheduler, own=own)
    limit = run.arguments.save_total_limit
    if run.directory is not None and limit is not None:
        for path in checkpoints_in(run.arguments.output_dir)[:-limit]:
            shutil.rmtree(path)


def load(run: TrainingRun, checkpoint: Path) -> None:
    """Bring a fresh run to where the checkpoint was saved.

    Raises:
        CheckpointError: It cannot be read, or belongs to another run.
    """
    if run.accelerator.distributed_type is DistributedType.DEEPSPEED:
        own = _load_engine(run, checkpoint)
    else:
        own = load_checkpoint(checkpoint, run.model, run.optimizer, run.scheduler)
    error: DistOptimError | None = None
    if not isinstance(own, dict) or own.keys() != {"progress", "random"}:
        error = CheckpointError(f"{str(checkpoint)!r} was not saved by launch/train.py. Resume from one that was.")
    elif own["progress"]["step"] > run.num_steps:
        error = CheckpointError(
            f"{str(checkpoint)!r} was saved at step {own['progress']['step']}, and this run has {run.num_steps}. Give "
            "more --max_steps or --num_train_epochs, or an earlier checkpoint."
        )
    raise_together(error)
    run.continue_from(own["progress"])
    run.random_state = own["random"]


def _save_engine(run: TrainingRun, target: Path, own: dict[str, Any]) -> None:
    """DeepSpeed writes its own files; what it does not know, the schedule among it, goes beside them."""
    with written_aside(target, None) as aside:
        cast(Any, run.model).save_checkpoint(str(aside), tag=ENGINE_TAG, exclude_frozen_parameters=False)
        state = {**own, "schedule": run.scheduler.state_dict()}
        # Collective: rank 0 moves the folder into place when the block ends, and every rank must have written by then.
        attempt(lambda: torch.save(state, aside / f"rank-{own_rank()}.pt"), target, None)


def _load_engine(run: TrainingRun, checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / f"rank-{own_rank()}.pt"
    error: DistOptimError | None = None
    if not path.is_file() or len(list(checkpoint.glob("rank-*.pt"))) != num_ranks():
        error = CheckpointError(
            f"{str(checkpoint)!r} was not saved under DeepSpeed by {num_ranks()} ranks. DeepSpeed resumes its own "
            "checkpoints, with the number of ranks that saved them."
        )
    raise_together(error)
    own = torch.load(path, weights_only=True, map_location="cpu")
    cast(Any, run.model).load_checkpoint(str(checkpoint), tag=ENGINE_TAG)
    run.scheduler.load_state_dict(own.pop("schedule"))
    return own


def endless_batches(
    accelerator: Accelerator, loader: DataLoader[Any], num_consumed: int, random_state: dict[str, Any] | None
) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch, each in its own order, from the batch after ``num_consumed``.

    ``random_state`` is put in place where the saved run had it: starting an epoch draws a number, too.
    """
    first_epoch, num_skipped = divmod(num_consumed, len(loader))
    for epoch in count(first_epoch):
        is_cut = epoch == first_epoch and num_skipped > 0
        part = accelerator.skip_first_batches(loader, num_skipped) if is_cut else loader
        for one in (loader, part):
            cast(Any, one).set_epoch(epoch)  # accelerate's subclass has it
        batches = iter(part)  # draws nothing before its first batch
        if is_cut:
            first = next(batches)
            _set_random_state(random_state)
            yield first
        elif epoch == first_epoch:
            _set_random_state(random_state)
        yield from batches


def _random_state(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any] | None) -> None:
    if state is None:
        return
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "device" in state and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        torch.get_device_module(device).set_rng_state(state["device"])
