"""The optimizer's parameters are the model's: what breaks that after building is refused, not trained past.

Wrapping a model, sharding it or moving it can replace its parameters, or change what part of them this rank stores. An
optimizer that was built before would go on stepping the old ones, and the loss would not tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dist_optim.errors import ParameterError
from dist_optim.layouts.detect import PlacedParameter, reshard
from dist_optim.ranks.agreement import raise_together

__all__ = ["ModelWatch"]

REMEDY = (
    "Build the optimizer last, on the model as it will be trained: wrap, shard and move the model first, then "
    "dist_optim.build_optimizer(model, ...); with accelerate, give the plain model to "
    "dist_optim.integrations.accelerate.prepare(accelerator, model, optimizer_name, ...), which does both in order."
)


class ModelWatch:
    """A pre-hook of ``step``: raises ``ParameterError`` when the model trains other parameters than the optimizer.

    In the first step all ranks raise together. Later steps look without communicating: whoever replaces parameters in
    the middle of a run does so on every rank, or leaves the others waiting anyway.
    """

    def __init__(
        self, model: nn.Module, placed: Sequence[PlacedParameter], process_group: dist.ProcessGroup | None
    ) -> None:
        self._model = weakref.ref(model)
        self._placed = list(placed)
        self._as_built = [_look_of(one.parameter) for one in placed]
        self._process_group = process_group
        self._have_agreed = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        error = self.find(optimizer)
        if not self._have_agreed:
            raise_together(error, self._process_group)
            self._have_agreed = True
        elif error is not None:
            raise error

    def find(self, optimizer: Optimizer) -> ParameterError | None:
        """The first parameter that is not what it was, if any. Local."""
        model = self._model()
        if model is None:
            return None
        reshard(model)  # a unit that is gathered shows other parameters for a while
        current = {id(parameter) for parameter in model.parameters()}
        listed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for one, as_built in zip(self._placed, self._as_built, strict=True):
            if id(one.parameter) not in current:
                return ParameterError(
                    f"Parameter {one.fqn!r} of the optimizer is no longer the model's: the model was wrapped, or its "
                    f"parameters replaced, after the optimizer was built. {REMEDY}"
                )
            if id(one.parameter) not in listed:
                return ParameterError(
                    f"Parameter {one.fqn!r} was exchanged in the optimizer's param_groups after building. {REMEDY}"
                )
            look = _look_of(one.parameter)
            if look != as_built:
                return ParameterError(
                    f"Parameter {one.fqn!r} was {_words(as_built)} when the optimizer was built, and is "
                    f"{_words(look)}: the model was sharded, moved or converted after that. {REMEDY}"
                )
        return None


Look = tuple[torch.Size, torch.dtype, torch.device]


def _look_of(parameter: nn.Parameter) -> Look:
    return parameter.shape, parameter.dtype, parameter.device


def _words(look: Look) -> str:
    shape, dtype, device = look
    return f"{dtype} of shape {tuple(shape)} on {device}"
