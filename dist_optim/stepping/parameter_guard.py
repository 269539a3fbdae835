"""The optimizer's parameters are the model's: what breaks that after building is refused, not trained past.

Wrapping a model, sharding it or moving it can replace its parameters, or change what part of them this rank stores. An
optimizer that was built before would go on stepping the old ones, and the loss would not tell.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_optim.errors import ParameterError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter, reshard_units, sharded_modules
from dist_optim.layouts.freezing_fsdp2 import GatheredFreezing

__all__ = ["NO_JOIN", "ParameterGuard"]

_LOCAL, _SHAPE, _DTYPE = attrgetter("_local_tensor"), attrgetter("shape"), attrgetter("dtype")
REMEDY = (
    "Build the optimizer last, on the model as it will be trained: wrap, shard and move the model first, then "
    "dist_optim.build_optimizer(model, ...); with accelerate, give the plain model to "
    "dist_optim.integrations.accelerate.prepare(accelerator, model, optimizer_name, ...), which does both in order."
)
NO_JOIN = (
    "Inside torch's Join (accelerate's join_uneven_inputs) ranks that ran out of batches answer for the engine alone, "
    "and nobody would answer for the exchange of the optimizer. Give every rank the same number of batches, without "
    "Join: drop_last=True in the data loader, a sampler that pads (torch's DistributedSampler), or accelerate's "
    "even_batches=True."
)


class ParameterGuard:
    """What an optimizer knows of the model that it was built on; it does not keep the model alive.

    Args:
        model: Placed and wrapped.
        placed: The optimizer's parameters.
    """

    def __init__(self, model: nn.Module, placed: Iterable[PlacedParameter]) -> None:
        self._model = weakref.ref(model)
        self._placed = list(placed)
        self._ids = {id(one.parameter) for one in self._placed}
        self._as_built = [_look_of(one.parameter) for one in self._placed]
        parameters = [one.parameter for one in self._placed]
        self._plain = [one for one in parameters if not isinstance(one, DTensor)]
        self._cut = [one for one in parameters if isinstance(one, DTensor)]
        self._memory = self._memory_now()
        self._freezing = GatheredFreezing(model)
        self._fsdp1 = [weakref.ref(unit) for unit in sharded_modules(model) if not isinstance(unit, FSDPModule)]
        self._note_members(model)
        self._left_join: object = None
        self._joinable = [weakref.ref(module) for module in model.modules() if isinstance(module, Joinable)]

    def over(self, placed: Iterable[PlacedParameter]) -> ParameterGuard:
        """The same for the parameters that the optimizer has from now on."""
        model = self._model()
        return self if model is None else ParameterGuard(model, placed)

    def reshard(self) -> None:
        """Free the full copies of sharded parameters that the engine may have left after a forward pass."""
        self._freezing.carry_over()
        reshard_units(self._freezing.gathered())
        reshard_units(unit for reference in self._fsdp1 if (unit := reference()) is not None)

    def problem(self) -> ParameterError | None:
        """The first parameter that is not what it was, if any. Local; call ``reshard`` before: a unit that is gathered
        shows other parameters.

        Raises:
            UnsupportedError: The step is taken inside torch's ``Join``. Raised at once, and not together: every rank is
                inside, or waits for what the engine alone sends.
        """
        self._refuse_join()
        model = self._model()
        if model is None:
            return None
        memory = self._memory_now()
        is_as_built = memory == self._memory or [_look_of(one.parameter) for one in self._placed] == self._as_built
        if is_as_built:
            self._memory = memory
            if self._members_now() == self._members:
                return None
        current = {id(parameter) for parameter in model.parameters()}
        if is_as_built and current.issuperset(self._ids):
            self._note_members(model)
            return None
        for one, as_built in zip(self._placed, self._as_built, strict=True):
            if id(one.parameter) not in current:
                return ParameterError(
                    f"Parameter {one.fqn!r} of the optimizer is no longer the model's: the model was wrapped, or its "
                    f"parameters replaced, after the optimizer was built. {REMEDY}"
                )
            look = _look_of(one.parameter)
            if look != as_built:
                return ParameterError(
                    f"Parameter {one.fqn!r} was {_words(as_built)} when the optimizer was built, and is "
                    f"{_words(look)}: the model was sharded, moved or converted after that. {REMEDY}"
                )
        return None

    def _memory_now(self) -> tuple[list[int], list[torch.Size], list[torch.dtype]]:
        """Of each part here: while all of it stays, so do the parameter's shape and device, which are slower to ask."""
        parts = [*self._plain, *map(_LOCAL, self._cut)]
        return list(map(Tensor.data_ptr, parts)), list(map(_SHAPE, parts)), list(map(_DTYPE, parts))

    def _note_members(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._holders = [weakref.ref(one) for one in modules if one._parameters]
        self._parents = [weakref.ref(one) for one in modules if one._modules]
        self._members = self._members_now()

    def _members_now(self) -> list[int]:
        """The ids of all parameters, then of all children: told in a fraction of the time of walking them."""
        parameters = [one._parameters.values() for reference in self._holders if (one := reference()) is not None]
        children = [one._modules.values() for reference in self._parents if (one := reference()) is not None]
        return list(map(id, chain.from_iterable([*parameters, *children])))

    def _refuse_join(self) -> None:
        for reference in self._joinable:
            module = reference()
            config = None if module is None else module._join_config
            if config is None or not config.enable or config is self._left_join:
                continue
            if any(type(one) is Join and module in one._joinables for one in gc.get_objects()):
                raise UnsupportedError(f"step() was called inside Join. {NO_JOIN} No parameter was changed.")
            self._left_join = config  # torch leaves it as it was inside: who evaluates so goes on training after it


Look = tuple[torch.Size, torch.dtype, torch.device]


def _look_of(parameter: nn.Parameter) -> Look:
    return parameter.shape, parameter.dtype, parameter.device


def _words(look: Look) -> str:
    shape, dtype, device = look
    return f"{dtype} of shape {tuple(shape)} on {device}"
