"""``inspect``: what is in a checkpoint, whether it is whole and its parts fit, and what differs from another.

Everything is read as a load reads it, by allow-lists, and nothing is installed anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.group_values import decoded
from dist_optim.checkpoint.in_and_out.comparison import Difference, differences
from dist_optim.checkpoint.in_and_out.folder import Folder
from dist_optim.checkpoint.in_and_out.soundness import problems_in
from dist_optim.checkpoint.index import StoredTensor
from dist_optim.errors import CheckpointError, DistOptimError

__all__ = ["Inspection", "Tally", "inspect"]


@dataclass(slots=True)
class Tally:
    """So many tensors, of so many bytes."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0

    def add(self, one: StoredTensor) -> None:
        """Count one more."""
        self.tensors += 1
        self.elements += one.shape.numel()
        self.bytes += one.shape.numel() * one.dtype.itemsize


@dataclass(slots=True)
class Inspection:
    """What was found."""

    directory: str
    optimizer: str = ""
    steps: int = 0
    mode: str = ""
    world_size: int | None = None
    """Of the ranks that saved it; None where nothing says so."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Hyperparameters and counts; ``params`` is how many parameters are in the group."""
    state: dict[str, Tally] = field(default_factory=dict)
    """By key and dtype."""
    weights: dict[str, Tally] = field(default_factory=dict)
    """By dtype."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each."""
    problems: list[str] = field(default_factory=list)
    """What is damaged, missing, or does not belong together; empty for a checkpoint that loads."""
    other: str = ""
    """What it was compared with."""
    differences: list[Difference] = field(default_factory=list)
    """From the other one; empty where both would go on alike."""

    @property
    def is_sound(self) -> bool:
        """Whether it is whole, and equal to what it was compared with."""
        return not self.problems and not self.differences


def inspect(checkpoint: str | Path, other: str | Path | None = None) -> Inspection:
    """Look into a checkpoint, verify it, and compare it with another one. One process; nothing is changed.

    Verified are the checksums of all tensors, that the index names what is in the files and the whole of each tensor,
    and that records, state and weights are of the same parameters. Compared are hyperparameters, counts and every
    element of every tensor, whatever number of ranks wrote them.

    Args:
        checkpoint: A folder of ``save_checkpoint``, ``save_optimizer``, the Trainer or accelerate.
        other: The same, or None.

    Raises:
        CheckpointError: There is no such folder. What is wrong inside is in ``problems``.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {str(checkpoint)!r}. Give one that dist_optim saved.")
    found = Inspection(str(checkpoint))
    found.files = {str(one.relative_to(path)): one.stat().st_size for one in sorted(path.rglob("*")) if one.is_file()}
    try:
        folder = Folder.look(path)
        attempt(lambda: _describe(folder, found), path, None, is_reading=True)
    except DistOptimError as error:
        found.problems.append(str(error))
        return found
    found.problems += problems_in(folder)
    if other is not None:
        found.other = str(other)
        second = inspect(other)
        found.problems += [f"{other}: {problem}" for problem in second.problems]
        if not found.problems:
            found.differences = differences(folder, Folder.look(other))
    return found


def _describe(folder: Folder, found: Inspection) -> None:
    record = folder.record
    found.optimizer, found.steps, found.mode = record["optimizer"], record["num_steps"], record["mode"]
    found.world_size = folder.about.get("world_size")
    found.groups = [
        {**{key: _shown(value) for key, value in group.items()}, "params": len(group["params"])}
        for group in record["param_groups"]
    ]
    for name, one in folder.stored.items():
        kind, _, key = name.partition("/")
        label = key.rpartition("/")[2] if kind == "state" else kind
        found.state.setdefault(f"{label} ({_text(one)})", Tally()).add(one)
    for one in folder.weights.stored.values() if folder.weights is not None else ():
        found.weights.setdefault(_text(one), Tally()).add(one)


def _text(one: StoredTensor) -> str:
    return str(one.dtype).removeprefix("torch.")


def _shown(value: Any) -> Any:
    """A group's value for people; a tensor is one."""
    if isinstance(value, dict) and value.keys() == {"tuple"}:
        return list(decoded(value, {})) if not _has_tensor(value) else "tensors"
    return "tensor" if isinstance(value, dict) else value


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return "tensor" in value or any(map(_has_tensor, value.values()))
    return isinstance(value, list) and any(map(_has_tensor, value))
