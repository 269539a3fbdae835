"""The hyperparameters that an optimizer was built with, compared between a checkpoint and who loads it.

Values of the build, not of the moment: a schedule moves the learning rate all the time, and a class counts in its
groups. ``initial_lr`` stands for the rate where a schedule has put it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_optim.errors import HyperparameterError, StateDictError
from dist_optim.ranks.agreement import described
from dist_optim.specs.hyperparameters import Scope
from dist_optim.stepping.holdings import Holdings

__all__ = ["RATE", "START", "build_values", "check_build", "let_follow", "with_values_of_build"]

RATE, START = "lr", "initial_lr"
"""Keys of a param group: the rate of the moment, and where a schedule has begun."""
_OTHERS = ("params", "param_names", START)


def build_values(held: Holdings) -> list[dict[str, Any]]:
    """Of each param group, the constructor's arguments and over them the group's own values, as JSON has them."""
    return [{key: _plain(value) for key, value in own.items()} for own in _given(held)]


def check_build(directory: Path, held: Holdings, saved: Sequence[Mapping[str, Any]], allowed: Iterable[str]) -> None:
    """Refuse a checkpoint of an optimizer that was built with other hyperparameters. Not a collective.

    Args:
        directory: The checkpoint, for the message.
        held: The optimizer that loads it.
        saved: What ``build_values`` returned when it was saved.
        allowed: Names of those that may differ.

    Raises:
        StateDictError: With what differs.
        HyperparameterError: A name that is allowed to differ is no hyperparameter.
    """
    own, names = build_values(held), set(allowed)
    if unknown := names - {key for group in own for key in group}:
        known = sorted({key for group in own for key in group})
        raise HyperparameterError(
            f"allow_changed names {sorted(unknown)[0]!r}, which is no hyperparameter of {held.spec.name}. Known: "
            f"{', '.join(known)}."
        )
    if len(saved) != len(own):
        raise StateDictError(
            f"The checkpoint {str(directory)!r} is of {len(saved)} param groups, and the optimizer has {len(own)}. "
            "Build it with the groups that were saved."
        )
    defaults = _defaults(held)
    different = {
        key: f"{key} of group {at} is {theirs.get(key, 'not set')!r} in it and {ours.get(key, 'not set')!r} here"
        for at, (theirs, ours) in reversed(list(enumerate(zip(saved, own, strict=True))))
        for key in sorted(theirs.keys() | ours.keys(), reverse=True)
        if key not in names and theirs.get(key, defaults.get(key)) != ours.get(key, defaults.get(key))
    }
    if different:
        listed = sorted(different)
        allowed = sorted({*listed, *names})
        raise StateDictError(
            f"The checkpoint {str(directory)!r} was saved by an optimizer with other hyperparameters: "
            f"{different[listed[0]]} (different: {', '.join(listed)}). Build with the saved values; or, to go on with "
            f"the new ones, load with allow_changed={allowed!r} (launch/train.py: --allow_changed {','.join(allowed)})."
        )


def with_values_of_build(
    held: Holdings, groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], names: Iterable[str]
) -> list[dict[str, Any]]:
    """Saved param groups, with the values of this build under these names.

    A rate that has moved since its own build is moved as far from the one of this build.

    Args:
        held: The optimizer that loads.
        groups: As they were saved.
        saved: What ``build_values`` returned then.
        names: Which values.
    """
    made = [dict(group) for group in groups]
    for group, own, theirs in zip(made, _given(held), saved, strict=True):
        for name in names:
            if name == RATE and RATE in own and theirs.get(RATE):
                group[RATE] = own[RATE] * (group[RATE] / theirs[RATE])
                group |= {START: own[RATE]} if START in group else {}
            elif name in group and name in own:
                group[name] = own[name]
    return made


def let_follow(schedule: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Have a schedule, whose state has just been loaded, go on from the rates that the param groups have now."""
    schedule.load_state_dict(_following(schedule.state_dict(), groups))


def _following(state: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
    if isinstance(state, list):
        return [_following(one, groups) for one in state]
    if not isinstance(state, dict):
        return state
    now = [group.get(RATE) for group in groups]
    rates = {
        "base_lrs": [group.get(START, group.get(RATE)) for group in groups],
        "_last_lr": now,
        "learning_rates": now,
    }
    return {
        key: rates[key] if key in rates and isinstance(value, list) else _following(value, groups)
        for key, value in state.items()
    }


def _given(held: Holdings) -> list[dict[str, Any]]:
    made = []
    for group, own in zip(held.division.groups, held.groups, strict=True):
        values = held.spec.values_in(group, held.division.arguments)
        if START in values:
            values[RATE] = values[START]
        if isinstance(values.get(RATE), Tensor):  # which a schedule moves in place
            values[RATE] = own.get(START, values[RATE])
        made.append({key: value for key, value in values.items() if key not in _OTHERS and not callable(value)})
    return made


def _defaults(held: Holdings) -> dict[str, Any]:
    """What an absent value means: another version of a package may know one more hyperparameter, or one less."""
    return {one.name: _plain(one.default) for one in held.spec.records() if one.scope is not Scope.MATRIX}


def _plain(value: Any) -> Any:
    """As JSON has it: sequences are lists, and what it has no word for is a text."""
    if isinstance(value, Tensor):  # no larger one is a hyperparameter, nor to be read here where it is sharded
        return value.tolist() if type(value) is Tensor and value.numel() == 1 else "a tensor"
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else described(value)
