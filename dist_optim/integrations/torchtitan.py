"""torchtitan: what its trainer calls an ``OptimizersContainer``, over one optimizer of ours.

torchtitan 0.3 builds it by ``config.optimizer.build(model_parts=...)`` when the model is in place, makes schedules for
the optimizers that it iterates over, and saves ``state_dict()`` by ``torch.distributed.checkpoint``, at any time and on
all ranks. Nothing of torchtitan is imported: ``Config`` has what its trainer reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed.checkpoint.state_dict as torch_doors
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from dist_optim.building.build import build_optimizer
from dist_optim.errors import UnsupportedError
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["Config", "OptimizersContainer"]

FLAT = torch_doors.StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(kw_only=True, slots=True)
class Config:
    """What a torchtitan configuration has in the place of ``OptimizersContainer.Config``."""

    name: str
    """A registered name (``dist_optim.names()``)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Everything else that ``dist_optim.build_optimizer`` takes: ``lr``, ``target_modules``, ``params``, ..."""

    def build(self, *, model_parts: Sequence[nn.Module]) -> OptimizersContainer:
        """The container, on the placed model. Collective, as ``build_optimizer``."""
        return OptimizersContainer(self, model_parts=model_parts)


class OptimizersContainer(Optimizer, Stateful):
    """One ``DistributedOptimizer``, as torchtitan's trainer, schedules and checkpoints take it.

    Args:
        config: The optimizer.
        model_parts: The model, in one part.

    Raises:
        UnsupportedError: The model is cut into the parts of a pipeline.
        DistOptimError: Whatever ``build_optimizer`` refuses.
    """

    def __init__(self, config: Config, *, model_parts: Sequence[nn.Module]) -> None:
        if len(model_parts) != 1:
            raise UnsupportedError(
                f"The model has {len(model_parts)} parts, of a pipeline: their ranks would wait for each other. Set "
                "pipeline_parallel_degree to 1; FSDP, HSDP, tensor and expert parallelism are served."
            )
        self.model_parts = list(model_parts)
        self.optimizers: list[DistributedOptimizer] = [build_optimizer(model_parts[0], config.name, **config.options)]
        parameters = [one for group in self.optimizers[0].param_groups for one in group["params"]]
        super().__init__(parameters, {})  # for its hooks

    def __iter__(self) -> Iterator[DistributedOptimizer]:
        return iter(self.optimizers)

    def __len__(self) -> int:
        return len(self.optimizers)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As ``DistributedOptimizer.step``. Collective."""
        if closure is not None:
            raise UnsupportedError("torchtitan's container takes no closure. Call step().")
        self.optimizers[0].step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizers[0].zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """By ``state.<parameter>.<key>`` and ``param_groups.<parameter>.<key>``. Takes no step. Collective."""
        return torch_doors.get_optimizer_state_dict(self.model_parts[0], self.optimizers[0], options=FLAT)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Install what ``state_dict`` returned, perhaps under another sharding. Collective."""
        torch_doors.set_optimizer_state_dict(self.model_parts[0], self.optimizers[0], state_dict, options=FLAT)
