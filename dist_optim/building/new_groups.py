"""Param groups that are added to an optimizer after it was built: the model's parameters, placed and checked."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from dist_optim.building.groups import arrange
from dist_optim.errors import ParameterError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.growing import Grown

__all__ = ["NewGroups"]


class NewGroups:
    """What ``add_param_group`` needs of the building; it does not keep the model alive.

    Args:
        model: As the optimizer was built on.
        hyperparameters: Of the optimizer, as they were given.
        process_group: All ranks that train the model.
    """

    def __init__(
        self, model: nn.Module, hyperparameters: Mapping[str, Any], process_group: dist.ProcessGroup | None
    ) -> None:
        self._model = weakref.ref(model)
        self._hyperparameters = dict(hyperparameters)
        self._process_group = process_group

    def arranged(
        self,
        spec: OptimizerSpec,
        given: Mapping[str, Any],
        listed: set[int],
        shared_by: dist.ProcessGroup | None,
    ) -> Grown:
        """The group with placed parameters and checked values, and where all parameters of the model are now.

        Args:
            spec: The optimizer.
            given: As torch's ``add_param_group`` takes it.
            listed: Ids of the parameters that some group has already.
            shared_by: The ranks that share the optimizer's work.

        Raises:
            ParameterError, HyperparameterError, UnsupportedError: As ``build_optimizer``; on this rank alone.
        """
        model = self._model()
        if model is None:
            raise ParameterError("add_param_group: the model that the optimizer was built on is gone.")
        placed = detect(model, self._process_group)
        groups, _ = arrange(model, spec, placed, self._hyperparameters, params=[given])
        if len(groups) != 1:
            raise UnsupportedError(
                f"{spec.name}: its parameters need values of their own by kind (embeddings, matrices), which makes "
                f"{len(groups)} groups of this one. Add them one kind at a time, with lr and all else in the group."
            )
        (group,) = groups
        _refuse_listed(group, listed)
        _refuse_other_ranks(group, shared_by)
        return Grown(group, {name: one.position for name, one in placed.items()})


def _refuse_listed(group: ParamGroup, listed: set[int]) -> None:
    if twice := [one.fqn for one in group["params"] if id(one.parameter) in listed]:
        raise ParameterError(
            f"{twice[0]!r} is in a group already, as all parameters of the model are where params= was left out. What "
            "is to be added later must not be listed when the optimizer is built: "
            "params=[p for p in model.parameters() if p.requires_grad]; or list it there, frozen, in the group that "
            "it is to have. Nothing was changed."
        )


def _refuse_other_ranks(group: ParamGroup, shared_by: dist.ProcessGroup | None) -> None:
    here = None if not dist.is_initialized() else dist.get_process_group_ranks(shared_by or dist.group.WORLD)
    for one in group["params"]:
        if not _is_shared_by(one, here):
            raise UnsupportedError(
                f"{one.fqn!r} is sharded over other ranks than those that share the optimizer's work. Build another "
                "optimizer for it, with params=."
            )


def _is_shared_by(one: PlacedParameter, ranks: list[int] | None) -> bool:
    if ranks is None or one.layout.is_replicated:
        return True
    return dist.get_process_group_ranks(one.process_group or dist.group.WORLD) == ranks
