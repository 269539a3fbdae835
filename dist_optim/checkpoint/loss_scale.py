"""The scale of fp16 losses, which torch's ``GradScaler`` and DeepSpeed's scaler each keep in a form of their own.

What goes from one to the other is the scale, and the number of steps without an overflow since it changed. When they
raise and lower it stays each one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_optim.checkpoint.identity import read_record
from dist_optim.checkpoint.optimizer_content import RECORD
from dist_optim.checkpoint.schema import OPTIMIZER

__all__ = ["SCALER_FILE", "LossScale", "go_on_with_engines", "of_file"]

SCALER_FILE = "scaler.pt"
"""Of a ``GradScaler``, as accelerate and transformers name it."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """At one moment."""

    scale: float
    steady_steps: int

    def put_into(self, scaler: Any) -> None:
        """A ``GradScaler`` goes on with it, by its own interval."""
        own = scaler.state_dict()
        if own:  # of one that is switched off nothing is said
            steady = self.steady_steps % own["growth_interval"]
            scaler.load_state_dict({**own, "scale": self.scale, "_growth_tracker": steady})

    def for_engine(self, scaler: Any, num_steps: int) -> dict[str, Any]:
        """The attributes with which DeepSpeed's scaler goes on."""
        iteration = max(num_steps, self.steady_steps)
        return {
            "cur_scale": self.scale,
            "cur_iter": iteration,
            "last_overflow_iter": iteration - self.steady_steps - 1,
            "cur_hysteresis": scaler.delayed_shift,
        }


def go_on_with_engines(scaler: Any, optimizer: Path) -> None:
    """Let a ``GradScaler`` go on with what the folder of an optimizer says of DeepSpeed's, where it does.

    Raises:
        CheckpointError: The folder is damaged.
    """
    if not (optimizer / RECORD).is_file():
        return
    found: Mapping[str, Any] = read_record(optimizer / RECORD, OPTIMIZER).get("engine", {}).get("loss_scale", {})
    if found:
        steady = int(found["cur_iter"] - found["last_overflow_iter"] - 1)
        LossScale(float(found["cur_scale"]), steady).put_into(scaler)


def of_file(path: Path) -> LossScale | None:
    """What a file says of the ``GradScaler`` that it was saved from; None where there is none, or it was off."""
    if not path.is_file():
        return None
    found = torch.load(path, map_location="cpu", weights_only=True)
    return LossScale(float(found["scale"]), int(found["_growth_tracker"])) if found else None
