"""Lets FSDP2 keep what is frozen while a unit is gathered: after an evaluation, say, when it shows whole tensors.

The parameters of a gathered unit are other objects than its shards. At each gather FSDP2 gives them the
``requires_grad`` of the shards, and never the other way: who freezes what a gathered model shows has it frozen for one
forward pass, and then no longer (torch 2.13).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["GatheredFreezing", "param_groups_of", "reshard", "units_of"]


def reshard(module: FSDPModule) -> None:
    """Free the full copies that a unit has, if any: its shards get the ``requires_grad`` that it shows."""
    gathered = [unit for unit in param_groups_of(module) if not unit.is_sharded]
    for unit in gathered:
        for one in unit.fsdp_params:
            if one.sharded_state.name == "UNSHARDED":
                one.sharded_param.requires_grad_(one._unsharded_param.requires_grad)
    if gathered:
        module.reshard()


class GatheredFreezing:
    """Remembers what shards and gathered tensors said, to tell who was changed; and knows the units. Local.

    Args:
        model: It is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [one for one in model.modules() if isinstance(one, FSDPModule)]
        units: list[tuple[Any, Any]] = [(module, unit) for module in modules for unit in param_groups_of(module)]
        self._units = [(weakref.ref(module), weakref.ref(unit)) for module, unit in units]
        self._known: weakref.WeakKeyDictionary[Any, tuple[bool, bool]] = weakref.WeakKeyDictionary()
        """Of shard and gathered tensor, by FSDP2's record of both."""
        self._shown: list[bool] = []
        """What gathered tensors said when shards said the same."""
        self.carry_over()

    def gathered(self) -> list[nn.Module]:
        """The modules that have full copies now: none, as a rule, and then this takes little."""
        there = [(module, unit) for module, reference in self._units if (unit := reference()) is not None]
        modules = [module() for module, unit in there if not unit.is_sharded]
        return [module for module in modules if module is not None]

    def carry_over(self) -> None:
        """Give shards the ``requires_grad`` that was set on their gathered tensors since the last call."""
        there = [one for _, reference in self._units if (unit := reference()) is not None for one in unit.fsdp_params]
        # Before its first gather a unit shows nothing.
        shown = [getattr(one, "_unsharded_param", one.sharded_param).requires_grad for one in there]
        if shown == self._shown:  # no gathered tensor was changed: what is set on a shard stays there
            return
        for one, of_gathered in zip(there, shown, strict=True):
            now = one.sharded_param.requires_grad, of_gathered
            before = self._known.get(one, now)
            if now[0] == before[0] and now[1] != before[1]:  # else it was set on the shard, or came from there
                one.sharded_param.requires_grad_(now[1])
                now = now[1], now[1]
            self._known[one] = now
        self._shown = shown if shown == [one.sharded_param.requires_grad for one in there] else []


def param_groups_of(module: FSDPModule) -> list[Any]:
    """FSDP2's own record of what it shards in a module; one, or several where meshes differ."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one group until torch 2.12
    return [group for group in groups if group is not None]


def units_of(model: nn.Module) -> list[Any]:
    """The same of all of its modules."""
    return [unit for one in model.modules() if isinstance(one, FSDPModule) for unit in param_groups_of(one)]
