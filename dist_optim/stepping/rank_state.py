"""State dicts of one rank: plain tensors and scalars by parameter name, and back.

::

    {"optimizer": name, "rank": r, "world_size": W, "num_steps": n, "mode": "train" or "eval",
     "counters": [key, ...],                             # of the groups' keys: what upstream itself counts
     "state": {fqn: {key: tensor or scalar}},            # what this rank owns or steps locally
     "param_groups": [{hyperparameters, counters, "params": [fqn, ...]}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_optim.errors import StateDictError
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.holdings import Holdings, Progress

__all__ = ["check_groups", "install", "plain_groups", "read", "write"]


def read(held: Holdings, progress: Progress) -> dict[str, Any]:
    """This rank's share; tensors are the live ones, as torch's ``state_dict`` returns them."""
    state = {}
    for instance, index in held.stepped_here():
        encoded = instance.encoded_state(index)
        if encoded:
            state[held.placed[index].fqn] = encoded
    return {
        **_header(held),
        "num_steps": progress.num_steps,
        "mode": progress.mode,
        "counters": held.counter_keys(),
        "state": state,
        "param_groups": plain_groups(held),
    }


def plain_groups(held: Holdings) -> list[dict[str, Any]]:
    """The param groups with names for parameters, without what cannot be saved."""
    return [
        {**{key: value for key, value in group.items() if key != "params" and not callable(value)}, "params": names}
        for group, names in zip(held.groups, held.names_by_group(), strict=True)
    ]


def write(held: Holdings, progress: Progress, state_dict: Mapping[str, Any]) -> None:
    """Check that the state dict is this rank's, then install it."""
    _check(held, state_dict)
    install(
        held,
        progress,
        state=state_dict["state"],
        groups=state_dict["param_groups"],
        counters=state_dict["counters"],
        num_steps=state_dict["num_steps"],
        mode=state_dict["mode"],
    )


def install(
    held: Holdings,
    progress: Progress,
    *,
    state: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    counters: Sequence[str],
    num_steps: int,
    mode: str,
) -> None:
    """Replace all state that this rank steps by; a parameter that ``state`` does not name has none afterwards.

    Args:
        held: What is written into.
        progress: The same.
        state: Encoded state by parameter name; what other ranks step may be in it too.
        groups: One for each param group, with the parameters in the same order.
        counters: Keys of the groups that upstream itself counts in.
        num_steps: Steps taken.
        mode: Which weights are in place.
    """
    for instance, index in held.stepped_here():
        instance.write_encoded_state(index, state.get(held.placed[index].fqn, {}))
    for group, saved in zip(held.groups, groups, strict=True):
        group.update({key: _copy(value) for key, value in saved.items() if key != "params"})
    own = [{key: group[key] for key in counters if key in group} for group in held.groups]
    for instance in held.instances:
        instance.write_counters(own)
    progress.num_steps, progress.mode = num_steps, mode


def _check(held: Holdings, state_dict: Mapping[str, Any]) -> None:
    own = _header(held)
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
    check_groups(held, state_dict["param_groups"])
    here = {held.placed[index].fqn for _, index in held.stepped_here()}
    foreign = sorted(set(state_dict["state"]) - here)
    if foreign:
        raise StateDictError(
            f"The state dict holds state of {foreign[:5]}, which this rank does not own. Build the optimizer with the "
            "arguments of the saved run (bucket sizes, target_modules and param groups decide who owns what)."
        )


def check_groups(held: Holdings, saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse param groups that have other parameters.

    Raises:
        StateDictError: With the names that differ.
    """
    theirs, ours = [list(group["params"]) for group in saved], held.names_by_group()
    if theirs != ours:
        own, other = {n for g in ours for n in g}, {n for g in theirs for n in g}
        raise StateDictError(
            f"The state dict has other param groups. Only in the state dict: {sorted(other - own)[:5]}; only in the "
            f"optimizer: {sorted(own - other)[:5]}; sizes {[len(g) for g in theirs]} against "
            f"{[len(g) for g in ours]}. Build the optimizer with the same model, groups and target_modules."
        )


def _header(held: Holdings) -> dict[str, Any]:
    """What must be equal between a saved share and the optimizer that loads it."""
    return {"optimizer": held.spec.name, "rank": held.rank, "world_size": num_ranks(held.process_group)}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
