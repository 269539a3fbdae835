"""State dicts: plain tensors and scalars by parameter name, and back.

::

    {"optimizer": name, "rank": r, "world_size": W, "num_steps": n, "mode": "train" or "eval",
     "counters": [key, ...],                             # of the groups' keys: what upstream itself counts
     "state": {fqn: {key: tensor or scalar}},            # what this rank owns or steps locally; or all, see below
     "extras": {key: tensor or text},                    # what upstream keeps that is no parameter's; mostly empty
     "param_groups": [{hyperparameters, counters, "params": [fqn, ...]}]}

Where parameters are replicated, ``state`` is all of it, and rank and world_size are None. What ``state_dict`` of
upstream's own class returns loads as well: it has ``state`` and ``param_groups`` alone, and numbers for names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_optim.errors import StateDictError
from dist_optim.ranks.agreement import num_ranks
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.state_codec import decode, encode
from dist_optim.stepping import half_steps
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.sharing import from_owner
from dist_optim.stepping.whole_state import StateByName, gathered, own_state, parts_of

__all__ = [
    "check_extras",
    "check_groups",
    "install",
    "is_replicated",
    "marked",
    "plain_groups",
    "read",
    "read_share",
    "restored",
    "write",
]

_PROGRESS = "dist_optim_progress"
"""Key of the first param group, in what torch's doors take: how far the optimizer has come."""
_MODES = ("train", "eval")
_PLAIN = (Tensor, bool, int, float, str, type(None))


def read(held: Holdings, progress: Progress) -> dict[str, Any]:
    """All state where parameters are replicated, else this rank's share. Collective in the first case, after step 0.

    Raises:
        StateDictError: The last step failed half way: on all ranks alike.
    """
    _refuse_half_step(progress)
    if not is_replicated(held):
        return read_share(held, progress)
    if progress.is_fresh:
        return _state_dict(held, progress, own_state(held), held.extras(), {"rank": None, "world_size": None})
    extras = from_owner(held.extras(), held)
    return _state_dict(held, progress, gathered(held), extras, {"rank": None, "world_size": None})


def read_share(held: Holdings, progress: Progress) -> dict[str, Any]:
    """This rank's share; tensors are the live ones, as torch's ``state_dict`` returns them. Not a collective."""
    _refuse_half_step(progress)
    return _state_dict(held, progress, own_state(held), held.extras(), _place(held))


def _refuse_half_step(progress: Progress) -> None:
    if reason := progress.why_not_saved():
        raise StateDictError(reason)


def _state_dict(
    held: Holdings, progress: Progress, state: StateByName, extras: dict[str, Any], place: dict[str, Any]
) -> dict[str, Any]:
    return {
        "optimizer": held.spec.name,
        **place,
        "num_steps": progress.num_steps,
        "mode": progress.mode,
        "counters": held.counter_keys(),
        "state": state,
        **({"extras": extras} if extras else {}),
        "param_groups": plain_groups(held),
    }


def plain_groups(held: Holdings) -> list[dict[str, Any]]:
    """The param groups with names for parameters, without code; objects in them as ``specs.state_codec`` has them."""
    kept = [
        {key: _stored(key, value) for key, value in group.items() if key != "params" and not callable(value)}
        for group in held.groups
    ]
    return [{**own, "params": names} for own, names in zip(kept, held.names_by_group(), strict=True)]


def _stored(key: str, value: Any) -> Any:
    if _is_simple(value):
        return value
    leaves: dict[str, Tensor] = {}
    text = json.dumps(encode(value, key, leaves))
    return {STRUCTURE: text, **leaves}


def _is_simple(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` takes it, and JSON, as it is."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return all(map(_is_simple, value))
    if type(value) is dict:
        return all(isinstance(key, str) and _is_simple(item) for key, item in value.items())
    return isinstance(value, Tensor) or type(value) in (bool, int, float, str, type(None))


def marked(groups: Sequence[dict[str, Any]], num_steps: int, mode: str) -> None:
    """Say in the groups of a state dict how far the optimizer has come.

    In a tensor that has a dim: with ``full_state_dict=True`` torch 2.13 ends in a KeyError on a number that the
    optimizer which is loaded has not (``_distribute_state_dict`` puts it beside that one's own), and leaves such a
    tensor alone.
    """
    for group in groups[:1]:
        group[_PROGRESS] = torch.tensor([num_steps, _MODES.index(mode)], device="cpu")


def restored(group: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a param group that ``plain_groups`` has made, as the group has them; copies."""
    return {key: _restored(value) for key, value in group.items() if key != "params"}


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and STRUCTURE in value:
        return decode(json.loads(value[STRUCTURE]), value)
    return _copy(value)


def write(held: Holdings, progress: Progress, state_dict: Mapping[str, Any]) -> None:
    """Check that the state dict fits, as a whole or as this rank's share, then install it."""
    _refuse_others(state_dict)
    if "optimizer" not in state_dict:
        state_dict = _as_ours(held, state_dict)
    _check(held, state_dict)
    state = state_dict["state"]
    install(
        held,
        progress,
        state=parts_of(state, held) if state_dict["world_size"] is None else state,
        groups=state_dict["param_groups"],
        counters=state_dict["counters"],
        extras=state_dict.get("extras", {}),
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
    extras: Mapping[str, Any],
    num_steps: int,
    mode: str,
    may_keep: bool = False,
) -> None:
    """Replace all state that this rank steps by; a parameter that ``state`` does not name has none afterwards.

    Args:
        held: What is written into.
        progress: The same.
        state: Encoded state by parameter name; what other ranks step may be in it too.
        groups: One for each param group, with the parameters in the same order.
        counters: Keys of the groups that upstream itself counts in.
        extras: What upstream keeps that is no parameter's.
        num_steps: Steps taken.
        mode: Which weights are in place.
        may_keep: Whether tensors of the state may be kept as they are: nobody else uses them.
    """
    for instance, index in held.stepped_here():
        instance.write_encoded_state(index, state.get(held.placed[index].fqn, {}), may_keep=may_keep)
    for group, saved in zip(held.groups, groups, strict=True):
        group.update(restored(saved))
    own = [{key: group[key] for key in counters if key in group} for group in held.groups]
    for instance in held.instances:
        if instance.extras is not None:
            instance.extras.write(extras)
        instance.group_values.write_counters(own)
    progress.num_steps, progress.mode, progress.failed_step = num_steps, mode, None
    progress.num_loads += bool(num_steps or any(state.values()))  # accelerate loads what was just built
    half_steps.heal(one.parameter for one in held.placed)


def _refuse_others(given: Any) -> None:
    if not isinstance(given, Mapping) or not isinstance(given.get("state"), Mapping) or "param_groups" not in given:
        what = f"the keys {sorted(map(str, given))[:5]}" if isinstance(given, Mapping) else repr(given)[:80]
        raise StateDictError(
            f"load_state_dict was given {what}: no optimizer's state dict, which has state and param_groups. Give what "
            "state_dict() returned."
        )


def _as_ours(held: Holdings, given: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of upstream's own class, whose parameters are numbers in the order of the groups, or names."""
    saved = list(given["param_groups"])
    named = [name for group in held.names_by_group() for name in group]
    theirs = [one for group in saved for one in group["params"]]
    if all(isinstance(one, int) for one in theirs) and len(theirs) == len(named):
        name_of = dict(zip(theirs, named, strict=True))
    else:
        name_of = {one: one for one in theirs}
    state = {name_of.get(key, key): dict(own) for key, own in given["state"].items()}
    driver = held.instances[0].driver
    state = {name: driver.encode_state(own) for name, own in state.items()}
    marks = [group[_PROGRESS].tolist() for group in saved if _PROGRESS in group]
    groups = [
        {**{key: value for key, value in group.items() if key != _PROGRESS}, "params": [name_of[one] for one in params]}
        for group in saved
        for params in [group["params"]]
    ]
    evaluates = any(group.get("train_mode") is False for group in groups)
    num_steps, mode = marks[0] if marks else (_steps_in(state, groups), int(evaluates))
    return {
        "optimizer": held.spec.name,
        "rank": None,
        "world_size": None,
        "num_steps": num_steps,
        "mode": _MODES[mode],
        "counters": _counters_in(held, groups),
        "state": state if num_steps else {},  # before the first step it is room, made for torch's doors
        "param_groups": groups,
    }


def _counters_in(held: Holdings, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of upstream's groups that no user sets; a class may begin to count in its first step."""
    own = {key for group in held.counters() for key in group}
    known = held.pushed_keys | {"params", "param_names", "optim"}
    kinds = (*_PLAIN, tuple)
    return sorted(own | {k for group in groups for k, v in group.items() if k not in known and isinstance(v, kinds)})


def _steps_in(state: StateByName, groups: Sequence[Mapping[str, Any]]) -> int:
    """Steps taken, where upstream counts them."""
    counts = [own[key] for own in (*state.values(), *groups) for key in ("step", "k") if key in own]
    return max((int(count) for count in counts), default=1 if state else 0)


def _check(held: Holdings, state_dict: Mapping[str, Any]) -> None:
    own = {"optimizer": held.spec.name, **_place(held)}
    missing = [key for key in (*own, "num_steps", "mode", "counters") if key not in state_dict]
    if missing:
        raise StateDictError(
            f"This is not a state dict of a DistributedOptimizer: {', '.join(missing)} is missing. Load what "
            "state_dict() returned on this rank."
        )
    is_whole = state_dict["world_size"] is None
    for key in ("optimizer",) if is_whole else own:
        if state_dict[key] != own[key]:
            raise StateDictError(
                f"The state dict was saved with {key} {state_dict[key]!r}, but is loaded with {key} {own[key]!r}. "
                "Every rank must load its own share, with the optimizer and the number of ranks that saved it."
            )
    check_groups(held, state_dict["param_groups"])
    check_extras(held, state_dict.get("extras", {}))
    here = {held.placed[index].fqn for _, index in held.stepped_here()}
    known = {placed.fqn for placed in held.placed} if is_whole else here
    foreign = sorted(set(state_dict["state"]) - known)
    if foreign:
        raise StateDictError(
            f"The state dict holds state of {foreign[:5]}, which this rank does not own. Build the optimizer with the "
            "arguments of the saved run (bucket sizes, target_modules and param groups decide who owns what)."
        )


def check_extras(held: Holdings, extras: Mapping[str, Any]) -> None:
    """Refuse what upstream keeps outside the state of its parameters, where it cannot be installed here.

    Raises:
        StateDictError: With the reason.
    """
    readable = (instance.extras for instance in held.instances if instance.extras is not None)
    if reason := next(filter(None, (one.why_not_written(extras) for one in readable)), ""):
        raise StateDictError(f"{held.spec.name}: {reason}")


def check_groups(held: Holdings, saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuse param groups that have other parameters, or another algorithm.

    Raises:
        StateDictError: With what differs.
    """
    theirs, ours = [list(group["params"]) for group in saved], held.names_by_group()
    if theirs != ours:
        own, other = {n for g in ours for n in g}, {n for g in theirs for n in g}
        if own == other and sorted(map(sorted, theirs)) == sorted(map(sorted, ours)):
            at = next(at for at, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
            raise StateDictError(
                f"The state dict has the same param groups in another order: group {at} begins with "
                f"{theirs[at][:3]} there, and with {ours[at][:3]} in the optimizer. Build the optimizer with groups "
                "and parameters in the order that was saved."
            )
        raise StateDictError(
            f"The state dict has other param groups. Only in the state dict: {sorted(other - own)[:5]}; only in the "
            f"optimizer: {sorted(own - other)[:5]}; sizes {[len(g) for g in theirs]} against "
            f"{[len(g) for g in ours]}. Build the optimizer with the same model, groups and target_modules."
        )
    for number, (here, there) in enumerate(zip(held.groups, saved, strict=True)):
        if here.get("optim") != there.get("optim"):
            raise StateDictError(
                f"Group {number} of the state dict is of optim {there.get('optim')!r}, and the optimizer's of "
                f"{here.get('optim')!r}. Build the optimizer with the algorithms of the saved run."
            )


def _place(held: Holdings) -> dict[str, Any]:
    """What must be equal between a saved share and the optimizer that loads it."""
    return {"rank": held.rank, "world_size": num_ranks(held.process_group)}


def is_replicated(held: Holdings) -> bool:
    """Whether every rank holds every parameter whole."""
    return all(placed.layout.is_replicated for placed in held.placed)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
