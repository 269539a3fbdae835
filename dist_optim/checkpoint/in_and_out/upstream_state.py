"""The state dict that the unmodified upstream class loads, of state that is kept under logical names.

Upstream's own ``state_dict()`` writes it: one instance of the class, over parameters without values, is given all of
the state as it was kept, and is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.errors import StateDictError, UnsupportedError
from dist_optim.specs.composed import OPTIM, ComposedOptimizer
from dist_optim.specs.driver import STRUCTURE
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.stepping.rank_state import restored
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["casts_of", "encoded_states", "upstream_state_dicts"]


def upstream_state_dicts(
    optimizer: DistributedOptimizer,
    state: MutableMapping[str, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    extras: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """What each upstream class loads, by the name of the optimizer: one, or the parts of several.

    Args:
        optimizer: Built on a skeleton, in one process; it is used up.
        state: Encoded state by parameter, whole; emptied on the way, so that nothing is held twice.
        groups: With upstream's own values and counters; ``params`` are names.
        extras: What upstream kept that is no parameter's.

    Raises:
        UnsupportedError: Upstream's own state dict does not hold all of the state.
    """
    instance = _whole_instance(optimizer)
    _refuse_extras(optimizer, instance, extras)
    named = {optimizer.holdings.placed[index].fqn: index for index in instance.shadows}
    with_state = [name for name in named if state.get(name)]
    for name in with_state:
        instance.write_encoded_state(named[name], state.pop(name))
    for own, saved in zip(instance.optimizer.param_groups, groups, strict=True):
        _fill(own, saved)
    upstream = instance.optimizer
    if isinstance(upstream, ComposedOptimizer):
        parts = {name: part.optimizer for name, part in upstream.named_parts()}
        for name, part in parts.items():
            part.param_groups = [group for group in upstream.param_groups if group[OPTIM] == name]
        found = {name: _without_marks(part.state_dict()) for name, part in parts.items()}
    else:
        found = {optimizer.spec.name: upstream.state_dict()}
    _refuse_lost(optimizer.spec.name, found, len(with_state))
    return found


def casts_of(upstream: type[Optimizer], state: Mapping[Any, Any], dtypes: Sequence[torch.dtype]) -> list[str]:
    """Keys of the state that torch's ``load_state_dict`` casts to the parameter's dtype, which loses bits.

    Args:
        upstream: The class that will load it.
        state: By number.
        dtypes: Of the parameters, by number.
    """
    if upstream.load_state_dict is not Optimizer.load_state_dict:
        return []
    return sorted(
        {
            str(key)
            for number, own in state.items()
            for key, value in own.items()
            if isinstance(value, Tensor) and key != "step" and type(value) is Tensor
            if value.is_floating_point() and value.dtype.itemsize > dtypes[number].itemsize
        }
    )


def _whole_instance(optimizer: DistributedOptimizer) -> UpstreamInstance:
    """One instance that steps everything, where the step itself goes in rounds."""
    held = optimizer.holdings
    if len(held.instances) == 1 and set(held.instances[0].shadows) == set(held.trained):
        return held.instances[0]
    shapes = {index: held.placed[index].shape for index in held.trained}
    return UpstreamInstance(held.spec, held.division.groups, shapes, held.division.arguments)


def _fill(own: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Upstream's group with the saved values; a tensor stays the tensor that upstream made."""
    for key, value in restored(saved).items():
        there = own.get(key)
        if isinstance(there, Tensor) and not isinstance(value, Tensor):
            there.fill_(value)
        else:
            own[key] = value


def _without_marks(state_dict: dict[str, Any]) -> dict[str, Any]:
    for group in state_dict["param_groups"]:
        group.pop(OPTIM, None)
    return state_dict


def _refuse_extras(optimizer: DistributedOptimizer, instance: UpstreamInstance, extras: Mapping[str, Any]) -> None:
    """What a class keeps outside its state, its own state dict loses, unless a constructor makes it alike."""
    if not extras:
        return
    made = instance.extras.read() if instance.extras is not None else {}
    if made.get(STRUCTURE) != extras[STRUCTURE] or any(
        not torch.equal(extras[key], made[key]) for key in extras if key != STRUCTURE
    ):
        raise UnsupportedError(
            f"{optimizer.spec.name} keeps more than the state of its parameters, in attributes that its own "
            "state_dict() leaves out: upstream could not go on from the export. Give in --optim_args what "
            "it was built with, where that differs from the defaults; or use the weights alone."
        )


def _refuse_lost(name: str, found: Mapping[str, Mapping[str, Any]], expected: int) -> None:
    kept = sum(1 for one in found.values() for key, own in one["state"].items() if own and isinstance(key, int))
    if kept < expected:
        raise UnsupportedError(
            f"{name}: upstream keeps state where its own state_dict() does not list it by number ({kept} of {expected} "
            "parameters are there), so that upstream itself cannot resume: on the exported weights it begins with new "
            "state; to keep it, go on with dist_optim from the checkpoint."
        )


def encoded_states(
    optimizer: DistributedOptimizer, content: Mapping[str, Any], name_of: Mapping[Any, str]
) -> dict[str, dict[str, Any]]:
    """State by name and encoded, of a state dict of upstream's. A class that loads in its own way is asked to.

    torch's own ``load_state_dict`` is gone around: it casts to the parameters' dtype.

    Args:
        optimizer: Built on the parameters, in one process.
        content: With numbers.
        name_of: Names for them.

    Raises:
        StateDictError: Upstream refuses it.
    """
    if optimizer.spec.own_class().load_state_dict is Optimizer.load_state_dict:
        driver = optimizer.spec.driver
        return {name_of[number]: driver.encode_state(own) for number, own in content["state"].items() if own}
    held = optimizer.holdings
    instance = UpstreamInstance(
        held.spec,
        held.division.groups,
        {index: held.placed[index].shape for index in held.trained},
        held.division.arguments,
    )
    index_of = {placed.fqn: index for index, placed in enumerate(held.placed)}
    try:
        instance.optimizer.load_state_dict(dict(content))
        found = {name: instance.encoded_state(index_of[name]) for name in name_of.values()}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StateDictError(
            f"{optimizer.spec.name}: upstream does not load this state dict: {type(error).__name__}: {error}. Give "
            "what its own state_dict() returned, and in optim_args what it was built with."
        ) from error
    return {name: own for name, own in found.items() if own}
