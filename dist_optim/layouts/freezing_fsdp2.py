"""Lets FSDP2 keep what is frozen while a unit is gathered: after an evaluation, say, when it shows whole tensors.

The parameters of a gathered unit are other objects than its shards. At each gather FSDP2 gives them the
``requires_grad`` of the shards, and never the other way: who freezes what a gathered model shows has it frozen for one
forward pass, and then no longer (torch 2.13).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["GatheredFreezing", "keep_freezing", "param_groups_of", "units_of"]


def keep_freezing(module: FSDPModule) -> None:
    """Before a unit is resharded: if it is gathered now, its shards get the ``requires_grad`` that it shows."""
    for one in _params_of(module):
        if one.sharded_state.name == "UNSHARDED":
            one.sharded_param.requires_grad_(one._unsharded_param.requires_grad)


class GatheredFreezing:
    """Remembers what shards and gathered tensors said, to tell who was changed. Local.

    Args:
        model: It is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._params = [weakref.ref(one) for unit in units_of(model) for one in unit.fsdp_params]
        self._known: list[tuple[bool, bool] | None] = [None] * len(self._params)
        self.carry_over()

    def carry_over(self) -> None:
        """Give shards the ``requires_grad`` that was set on their gathered tensors since the last call."""
        for at, reference in enumerate(self._params):
            one: Any = reference()
            if one is None:
                continue
            shard, gathered = one.sharded_param, getattr(one, "_unsharded_param", None)
            now = shard.requires_grad, shard.requires_grad if gathered is None else gathered.requires_grad
            before = self._known[at] or now
            if now[0] == before[0] and now[1] != before[1]:  # else it was set on the shard, or came from there
                shard.requires_grad_(now[1])
                now = now[1], now[1]
            self._known[at] = now


def param_groups_of(module: FSDPModule) -> list[Any]:
    """FSDP2's own record of what it shards in a module; one, or several where meshes differ."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one group until torch 2.12
    return [group for group in groups if group is not None]


def units_of(model: nn.Module) -> list[Any]:
    """The same of all of its modules."""
    return [unit for one in model.modules() if isinstance(one, FSDPModule) for unit in param_groups_of(one)]


def _params_of(module: FSDPModule) -> Iterator[Any]:
    for group in param_groups_of(module):
        yield from group.fsdp_params
