"""What a load of a damaged checkpoint did: refused it with nothing changed, or installed the right state."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from placements import place
from torch import Tensor, nn

import dist_optim
from dist_optim.checkpoint import load_optimizer, save_optimizer
from dist_optim.errors import CheckpointError, DistOptimError, StateDictError
from dist_optim.ranks.agreement import own_rank

GALORE: dict[str, Any] = {"rank": 2, "update_proj_gap": 3, "target_modules": "all-linear"}
HANG_S = 30


class Subject:
    """A run in training, and all that a load may change."""

    def __init__(self, name: str = "galore_adamw", width: int = 3, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.model = place(model, "ddp") if dist.is_initialized() else model
        options = GALORE if name.startswith("galore") else {}
        self.optimizer = dist_optim.build_optimizer(self.model, name, lr=0.1, print_audit=False, **options)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.own: Any = None
        self.train(2)

    def train(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            for number, parameter in enumerate(self.model.parameters()):
                parameter.grad = torch.linspace(-1, 2 + number, parameter.numel()).view_as(parameter)
            self.optimizer.step()
            self.schedule.step()
            self.own = {"step": self.optimizer.num_steps, "rank": own_rank()}

    def save(self, folder: Path) -> None:
        dist_optim.save_checkpoint(folder, self.model, self.optimizer, self.schedule, own=self.own)

    def load(self, folder: Path) -> None:
        self.own = dist_optim.load_checkpoint(folder, self.model, self.optimizer, self.schedule)

    def everything(self) -> Any:
        state = self.optimizer.state_dict()
        return copy.deepcopy([self.model.state_dict(), state, self.schedule.state_dict(), self.own])


class Alone(Subject):
    """Its optimizer, in a folder of its own."""

    def save(self, folder: Path) -> None:
        save_optimizer(folder, self.optimizer)

    def load(self, folder: Path) -> None:
        load_optimizer(folder, self.optimizer)

    def everything(self) -> Any:
        return copy.deepcopy(self.optimizer.state_dict())


def is_equal(one: Any, other: Any) -> bool:
    """To the bit, types included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        is_alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return is_alike and one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


# What a load did ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """``refused``, ``harmless`` (loaded, and right), or what must not be."""

    kind: str
    text: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind in ("refused", "harmless")


def outcome_of(subject: Subject, folder: Path, right: Sequence[Any]) -> Outcome:
    """Load, and look at everything before and after.

    Args:
        subject: What is loaded into.
        folder: The damaged checkpoint.
        right: What it may hold afterwards.
    """
    before = subject.everything()
    try:
        with _no_hang():
            subject.load(folder)
    except (CheckpointError, StateDictError) as error:
        is_same = is_equal(subject.everything(), before)
        kind = "refused" if is_same else "refused, and something was changed"
        return Outcome(kind, str(error))
    except DistOptimError as error:
        return Outcome("refused by another error", f"{type(error).__name__}: {error}")
    except TimeoutError:
        return Outcome("hang")
    except Exception as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}")
    found = subject.everything()
    return Outcome("harmless" if any(is_equal(found, one) for one in right) else "accepted, with another state")


@contextmanager
def _no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
