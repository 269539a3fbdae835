"""An optimizer and the engine that trains its model, as checkpoints see them.

Most engines let one ``DistributedOptimizer`` step the model's own parameters. DeepSpeed's step copies of them, in
several parts, and keep the model equal to those. What is saved and loaded is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from dist_optim.errors import CheckpointError
from dist_optim.layouts.detect import PlacedParameter, assert_held_by, detect
from dist_optim.layouts.layout import Elsewhere
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.unwrapping import find_optimizer
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["EngineView", "PlainView", "is_ours", "view_of"]

VIEW = "checkpoint_view"
"""Method of an optimizer that is no ``DistributedOptimizer``: returns its ``EngineView``."""


class EngineView(ABC):
    """What a checkpoint is of.

    Args:
        optimizer: The one that the user holds, with ``num_steps``, ``mode``, ``train`` and ``eval``.
        parts: What steps the model; each has all parameter groups, and steps a part of their parameters.
    """

    has_masters = False
    """Whether the engine holds the whole model in half precision, and trains fp32 masters of it."""

    def __init__(self, optimizer: Any, parts: Sequence[DistributedOptimizer]) -> None:
        self.optimizer = optimizer
        self.parts = list(parts)

    @property
    def spec(self) -> OptimizerSpec:
        return self.parts[0].spec

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """All ranks that train the model."""
        return self.parts[0].holdings.all_ranks

    @property
    def placed(self) -> Sequence[PlacedParameter]:
        """All parameters of all groups; ``shape`` is the logical one."""
        return self.parts[0].holdings.placed

    def training_weights(self) -> list[PlacedParameter]:
        """What upstream steps, where this rank holds a part of it: the model's parameters, or masters of them."""
        every = (one for part in self.parts for one in part.holdings.placed)
        here = (one.whole() for one in every if one.is_trained and not isinstance(one.layout, Elsewhere))
        return list({one.fqn: one for one in here}.values())

    @abstractmethod
    def model_parameters(self, model: nn.Module) -> Mapping[str, PlacedParameter]:
        """All parameters, as the model holds them.

        Raises:
            ParameterError: It is not the model of this optimizer; on this rank alone.
        """

    @abstractmethod
    def meet(self, call: str) -> None:
        """Wait for all ranks to make this call."""

    @abstractmethod
    def why_not_saved(self) -> str:
        """Why what is held now must not be saved, and what to do; empty where it may be."""

    def why_not_loaded(self) -> str:
        """Why nothing can be loaded into this engine, and what to do; empty where it can."""
        return ""

    @abstractmethod
    def look(self) -> None:
        """Before tensors or groups are read or written: the parts see the engine's present storage and values."""

    @abstractmethod
    def refresh(self) -> None:
        """After weights, state or groups were written to: the engine takes them over. Collective."""

    @property
    def schedule(self) -> Any:
        """The schedule that the engine steps itself; None where it has none."""
        return None

    def counters(self) -> dict[str, Any]:
        """What else the engine needs to go on: plain values. None of it is needed by another engine."""
        return {}

    def take_counters(self, counters: Mapping[str, Any], num_steps: int) -> None:  # noqa: B027
        """Install what ``counters`` returned, perhaps on another engine; most need none of it."""

    def take_loss_scale(self, found: Any) -> None:  # noqa: B027
        """Go on with the scale of fp16 losses that another strategy had (``loss_scale``), after ``take_counters``."""


class PlainView(EngineView):
    """One ``DistributedOptimizer`` that steps the model's own parameters."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        super().__init__(optimizer, [optimizer])
        self._one = optimizer

    def model_parameters(self, model: nn.Module) -> Mapping[str, PlacedParameter]:
        assert_held_by(model, self.placed)
        return detect(model, self.ranks)

    def meet(self, call: str) -> None:
        self._one.meet(call)

    def why_not_saved(self) -> str:
        return self._one.progress.why_not_saved()

    def look(self) -> None:
        self._one.free_gathered_copies()

    def refresh(self) -> None:
        self._one.free_gathered_copies()


def is_ours(optimizer: Any) -> bool:
    """Whether ``view_of`` knows it: an optimizer of dist_optim, whatever is around it."""
    return _find(optimizer) is not None


def view_of(optimizer: Any) -> EngineView:
    """What is to be saved or loaded, out of what accelerate and DeepSpeed put around it.

    Raises:
        CheckpointError: It was not built by dist_optim, or its engine is not there yet.
    """
    if isinstance(optimizer, EngineView):
        return optimizer
    found = _find(optimizer)
    if found is None:
        raise CheckpointError(
            f"{type(optimizer).__name__} was not built by dist_optim. Pass what build_optimizer or prepare returned, "
            "or DeepSpeed's engine.optimizer."
        )
    view: EngineView = PlainView(found) if isinstance(found, DistributedOptimizer) else getattr(found, VIEW)()
    return view


def _find(optimizer: Any) -> Any:
    inner = find_optimizer(optimizer, DistributedOptimizer)
    while inner is None and optimizer is not None:
        if hasattr(type(optimizer), VIEW):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return inner
