"""What others have written: where optimizer, weights and schedule lie in it.

=================================  ==============================  ==================  ====================
written by                         optimizer                       weights             schedule
=================================  ==============================  ==================  ====================
``torch.save(state_dict())``       the file itself                 (given besides)     (none)
transformers' own Trainer          ``optimizer.pt``                ``model*``,         ``scheduler.pt``
                                                                   ``pytorch_model*``
accelerate's ``save_state``        ``optimizer.bin``               the same            ``scheduler.bin``
``engine.save_checkpoint``         ``TAG/*_optim_states.pt``       the same files      the same files
=================================  ==============================  ==================  ====================

Pickled states of random generators and arguments (``random_states_0.pkl``, ``training_args.bin``) are never opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dist_optim.checkpoint.directory import read_json
from dist_optim.checkpoint.in_and_out.weight_files import weights_at
from dist_optim.checkpoint.in_and_out.weights import Weights
from dist_optim.errors import CheckpointError, UsageError

__all__ = ["Source", "find", "zero_folder"]

TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Source:
    """One that keeps upstream's state dict in a file."""

    state_dict: Path
    folder: Path | None
    """Around it; None where the file was given alone."""
    weights: Weights | None
    scheduler: Path | None
    steps: int | None
    """Taken, where something says so."""
    is_trainers: bool = False


def find(path: Path) -> Source:
    """What lies at ``path``.

    Raises:
        CheckpointError: Nothing that can be taken over: with what is.
    """
    if path.is_file():
        return Source(path, None, None, None, None)
    if (path / "optimizer.json").is_file() or (path / "optimizer" / "optimizer.json").is_file():
        raise CheckpointError(f"{str(path)!r} is a checkpoint of dist_optim already: load it as it is.")
    for name, schedule in (("optimizer.pt", "scheduler.pt"), ("optimizer.bin", "scheduler.bin")):
        if (path / name).is_file():
            _refuse_more(path, name)
            scheduler = path / schedule if (path / schedule).is_file() else None
            is_trainers = (path / TRAINER_STATE).is_file()
            steps = _steps_of_trainer(path / TRAINER_STATE) if is_trainers else None
            return Source(path / name, path, weights_at(path), scheduler, steps, is_trainers)
    raise CheckpointError(
        f"{str(path)!r} holds nothing that can be taken over: a file of torch.save(optimizer.state_dict()), a folder "
        "with optimizer.pt (the Trainer) or optimizer.bin (accelerate), or one of DeepSpeed's engine.save_checkpoint. "
        "Sharded states of FSDP (folders optimizer_0) are none of them: save with FULL_STATE_DICT."
    )


def zero_folder(path: Path) -> Path | None:
    """The folder with DeepSpeed's files: ``path`` itself, or the tag that its ``latest`` names; None for others.

    Raises:
        CheckpointError: ``latest`` names something else.
    """
    if path.is_dir() and any(path.glob("*_model_states.pt")):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8").strip()
    if not tag or Path(tag).name != tag or not any((path / tag).glob("*_model_states.pt")):
        raise CheckpointError(
            f"{str(latest)!r} names {tag!r}, which is no folder of DeepSpeed's. Give the tag's folder."
        )
    return path / tag


def _steps_of_trainer(path: Path) -> int:
    content = read_json(path)
    steps = content.get("global_step") if isinstance(content, dict) else None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise CheckpointError(f"{str(path)!r} is damaged: global_step is {json.dumps(steps)[:40]}.")
    return steps


def _refuse_more(path: Path, name: str) -> None:
    stem, _, ending = name.partition(".")
    if (more := path / f"{stem}_1.{ending}").is_file():
        raise UsageError(f"{str(more)!r}: there are several optimizers. Import each by its file, with its own --names.")
