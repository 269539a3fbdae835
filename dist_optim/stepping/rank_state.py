"""State dicts of one rank: plain tensors and scalars by parameter name, and back.

::

    {"optimizer": name, "rank": r, "world_size": W, "num_steps": n, "mode": "train" or "eval",
     "counters": [key, ...],                             # of the groups' keys: what upstream itself counts
     "state": {fqn: {key: tensor or scalar}},            # what this rank owns or steps locally
     "param_groups": [{hyperparameters, counters, "params": [fqn, ...]}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dist_optim.errors import StateDictError
from dist_optim.ranks.agreement import num_ranks, own_rank

if TYPE_CHECKING:
    from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["read", "write"]


def read(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """This rank's share; tensors are the live ones, as torch's ``state_dict`` returns them."""
    names = optimizer.parameter_names()
    state = {}
    for instance, index in optimizer.stepped_here():
        encoded = instance.encoded_state(index)
        if encoded:
            state[names[index]] = encoded
    groups = []
    for group, group_names in zip(optimizer.param_groups, _names_by_group(optimizer), strict=True):
        plain = {key: value for key, value in group.items() if key != "params" and not callable(value)}
        groups.append({**plain, "params": group_names})
    return {
        **_header(optimizer),
        "num_steps": optimizer.num_steps,
        "mode": optimizer.mode,
        "counters": optimizer.counter_keys(),
        "state": state,
        "param_groups": groups,
    }


def write(optimizer: DistributedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Check that the state dict is this rank's, then install it."""
    _check(optimizer, state_dict)
    names = optimizer.parameter_names()
    for instance, index in optimizer.stepped_here():
        instance.write_encoded_state(index, state_dict["state"].get(names[index], {}))
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: _copy(value) for key, value in saved.items() if key != "params"})
    counter_keys = set(state_dict["counters"])
    counters = [{key: group[key] for key in counter_keys & group.keys()} for group in optimizer.param_groups]
    for instance in optimizer.instances():
        instance.write_counters(counters)
    optimizer.num_steps = state_dict["num_steps"]
    optimizer.mode = state_dict["mode"]


def _check(optimizer: DistributedOptimizer, state_dict: Mapping[str, Any]) -> None:
    own = _header(optimizer)
    missing = [key for key in (*own, "num_steps", "mode", "counters", "state", "param_groups") if key not in state_dict]
    if missing:
        raise StateDictError(
            f"This is not a state dict of a DistributedOptimizer: {', '.join(missing)} is missing. Load what "
            "state_dict() returned on this rank."
        )
    for key, value in own.items():
        if state_dict[key] != value:
            raise StateDictError(
                f"The state dict was saved with {key} {state_dict[key]!r}, but is loaded with {key} {value!r}. "
                "Every rank must load its own share, with the optimizer and the number of ranks that saved it."
            )
    saved_groups = [list(group["params"]) for group in state_dict["param_groups"]]
    groups = _names_by_group(optimizer)
    if saved_groups != groups:
        ours, theirs = {n for g in groups for n in g}, {n for g in saved_groups for n in g}
        raise StateDictError(
            f"The state dict has other param groups. Only in the state dict: {sorted(theirs - ours)[:5]}; only in the "
            f"optimizer: {sorted(ours - theirs)[:5]}; sizes {[len(g) for g in saved_groups]} against "
            f"{[len(g) for g in groups]}. Build the optimizer with the same model, groups and target_modules."
        )
    names = optimizer.parameter_names()
    held = {names[index] for _, index in optimizer.stepped_here()}
    foreign = sorted(set(state_dict["state"]) - held)
    if foreign:
        raise StateDictError(
            f"The state dict holds state of {foreign[:5]}, which this rank does not own. Build the optimizer with the "
            "arguments of the saved run (bucket sizes, target_modules and param groups decide who owns what)."
        )


def _header(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """What must be equal between a saved share and the optimizer that loads it."""
    return {
        "optimizer": optimizer.spec.name,
        "rank": own_rank(optimizer.process_group),
        "world_size": num_ranks(optimizer.process_group),
    }


def _names_by_group(optimizer: DistributedOptimizer) -> list[list[str]]:
    names = iter(optimizer.parameter_names())
    return [[next(names) for _ in group["params"]] for group in optimizer.param_groups]


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
