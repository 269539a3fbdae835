"""What lies where in a checkpoint: in the folders of ``save_checkpoint``, of the Trainer and of accelerate alike.

==================  =========================  ===========================  ========================
written by          optimizer                  weights                      schedule
==================  =========================  ===========================  ========================
save_checkpoint     ``optimizer/``             ``model/``                   ``scheduler.pt``
the Trainer         ``optimizer/``             ``model.safetensors``, ...   ``scheduler.pt``
accelerate          ``dist_optim/``            ``model.safetensors``, ...   ``scheduler.bin``
save_optimizer      the folder itself          (none)                       (none)
==================  =========================  ===========================  ========================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_optim.checkpoint.directory import opened
from dist_optim.checkpoint.identity import read_record
from dist_optim.checkpoint.in_and_out.weight_files import weights_at
from dist_optim.checkpoint.in_and_out.weights import LogicalWeights, Weights
from dist_optim.checkpoint.index import StoredTensor, stored_tensors
from dist_optim.checkpoint.model_weights import FSDP_FOLDER, FSDP_PREFIX, OWN_FOLDER
from dist_optim.checkpoint.schema import CHECKPOINT, OPTIMIZER
from dist_optim.errors import CheckpointError

__all__ = ["Folder"]

RECORD, ABOUT, MODEL = "optimizer.json", "checkpoint.json", "model"
OPTIMIZER_FOLDERS = ("optimizer", "dist_optim")
MODEL_FOLDERS = {MODEL: "", OWN_FOLDER: "", FSDP_FOLDER: FSDP_PREFIX}
"""Folders of ``torch.distributed.checkpoint`` with weights, and what is put before each name in it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A checkpoint, looked at and not loaded."""

    path: Path
    optimizer: Path
    """Holds ``optimizer.json`` and ``tensors/``."""
    record: dict[str, Any]
    """Of the optimizer."""
    about: dict[str, Any]
    """``checkpoint.json``; empty where there is none."""
    stored: dict[str, StoredTensor]
    """The optimizer's tensors."""
    weights: Weights | None

    @classmethod
    def look(cls, path: str | Path) -> Folder:
        """Read the records and the indexes, and no tensor.

        Raises:
            CheckpointError: It is no checkpoint of ours, or its records are damaged.
        """
        given = opened(Path(path))
        optimizer = next((one for one in _optimizer_folders(given) if (one / RECORD).is_file()), None)
        if optimizer is None:
            raise CheckpointError(
                f"{str(path)!r} holds no optimizer of dist_optim ({RECORD} is neither in it nor in its folder "
                f"{OPTIMIZER_FOLDERS[0]}). Give a folder that dist_optim saved. What others wrote becomes one by: "
                "dist-optim import."
            )
        record = read_record(optimizer / RECORD, OPTIMIZER)
        about = read_record(given / ABOUT, CHECKPOINT) if (given / ABOUT).is_file() else {}
        stored = stored_tensors(optimizer / "tensors")
        return cls(given, optimizer, record, about, stored, None if optimizer == given else _weights_in(given, about))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The recorded param groups, as JSON has them."""
        return list(self.record["param_groups"])

    @property
    def training_weights(self) -> dict[str, str]:
        """Names in ``tensors/`` of the weights to go on from, by parameter, where they are not those to use."""
        own = {name.partition("/")[2]: name for name in self.stored if name.startswith("weights/")}
        masters = {
            name[len("state/") : -len(MASTER_KEY)]: name
            for name in self.stored
            if name.startswith("state/") and name.endswith(MASTER_KEY)
        }
        return {**own, **masters}

    @property
    def has_masters(self) -> bool:
        """Whether upstream stepped fp32 copies of weights in half precision."""
        return any(name.endswith(MASTER_KEY) for name in self.stored)


MASTER_KEY = "/(master)"


def _optimizer_folders(given: Path) -> list[Path]:
    return [opened(given / name) for name in OPTIMIZER_FOLDERS] + [given]


def _weights_in(given: Path, about: Mapping[str, Any]) -> Weights | None:
    for name, prefix in MODEL_FOLDERS.items():
        if (given / name / ".metadata").is_file():
            return LogicalWeights(given / name, prefix, sealed=about.get("model") if name == MODEL else None)
    return weights_at(given)
