"""What the doctor finds, and what changes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dist_optim.doctor.subject import Subject
from dist_optim.specs.hyperparameters import parse_optim_args

__all__ = ["TAKE_OUT", "Change", "Finding", "Rule", "applied", "in_deepspeed"]

Part = Literal["arguments", "accelerate", "deepspeed"]
TAKE_OUT: Any = object()
"""In the place of a value: the entry is left out."""


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of one part of the configuration, as it serves."""

    part: Part
    path: tuple[str, ...]
    value: Any = TAKE_OUT

    def __str__(self) -> str:
        name = {"arguments": "--", "accelerate": "accelerate: ", "deepspeed": "DeepSpeed: "}[self.part]
        where = f"{name}{'.'.join(self.path)}"
        return f"leave out {where}" if self.value is TAKE_OUT else f"{where} = {_written(self.value)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or will be missed."""

    code: str
    reason: str
    """What happens, why, and what to do: the text of the run-time error where there is one."""
    changes: tuple[Change, ...] = ()
    """To the nearest configuration that works; empty where nothing in a file can mend it."""
    command: str = ""
    """What to run, where the environment has to be changed."""
    is_error: bool = True
    """Whether the job would be refused or fail; else it would do less than it could, or is not known to work."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "code": self.code,
            "level": "error" if self.is_error else "warning",
            "reason": self.reason,
            "changes": [str(change) for change in self.changes],
            "command": self.command,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that the doctor looks for."""

    code: str
    find: Callable[[Subject], Iterable[Finding]]
    example: Mapping[str, Any] = field(default_factory=dict)
    """Parts of a configuration that shows it, as ``Subject.of`` takes them."""


def applied(subject: Subject, changes: Iterable[Change]) -> Subject:
    """The configuration after these changes; the subject itself is left as it is."""
    parts: dict[str, Any] = {}
    for change in changes:
        if change.part not in parts:
            parts[change.part] = copy.deepcopy(getattr(subject, change.part) or {})
        _apply(parts[change.part], change)
    return replace(subject, **parts)


def _apply(data: dict[str, Any], change: Change) -> None:
    *parents, key = change.path
    for parent in parents:
        if isinstance(data.get(parent), str):  # optim_args, as text
            data[parent] = dict(parse_optim_args(data[parent]))
        if change.value is TAKE_OUT and not isinstance(data.get(parent), dict):
            return
        data = data.setdefault(parent, {})
    if change.value is TAKE_OUT:
        data.pop(key, None)
    else:
        data[key] = change.value


def in_deepspeed(patch: Mapping[str, Any]) -> tuple[Change, ...]:
    """Changes of DeepSpeed's configuration from entries by their dotted places; None takes an entry out."""
    return tuple(
        Change("deepspeed", tuple(place.split(".")), TAKE_OUT if value is None else value)
        for place, value in patch.items()
    )


def _written(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
