"""The Trainer's model under FSDP: whether it is placed already, and how it is before there is an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from dist_optim.integrations.accelerate.placing import place_by_fsdp2
from dist_optim.integrations.accelerate.tensor_parallel import left_as_it_is

__all__ = ["is_sharded", "place_alone"]


def is_sharded(part: Any) -> bool:
    """Whether this is a model that FSDP holds already."""
    kinds = (FSDPModule, FullyShardedDataParallel)
    return isinstance(part, nn.Module) and any(isinstance(module, kinds) for module in part.modules())


def place_alone(trainer: Any) -> None:
    """Shard the Trainer's model by FSDP2 before there is an optimizer. Collective."""
    with left_as_it_is(trainer.accelerator):
        trainer.model = trainer.model_wrapped = place_by_fsdp2(trainer.accelerator, trainer.model)
