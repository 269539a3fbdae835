"""What the records of a checkpoint hold (``*.json``), in words that a program can hold them to.

A *kind* takes a value and says what is wrong with it, or nothing. What a record says of an optimizer, beyond the form,
is compared where the optimizer is known (``optimizer_state``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_optim.specs.driver import STRUCTURE

__all__ = ["CHECKPOINT", "FOLDER", "OPTIMIZER", "Kind", "census", "problem_in"]

Kind = Callable[[Any], str]
"""What is wrong with a value, beginning with where in it: empty where nothing is."""

MAX_COUNT = 1 << 62


def problem_in(record: Any, kind: Kind) -> str:
    """What is wrong with a record, in words; empty where nothing is."""
    return kind(record).lstrip(".")


def count(minimum: int = 0) -> Kind:
    """A whole number."""
    return lambda value: (
        ""
        if type(value) is int and minimum <= value <= MAX_COUNT
        else f" is {value!r:.80}, no whole number from {minimum}"
    )


def number(value: Any) -> str:
    """A finite number."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    return "" if is_one else f" is {value!r:.80}, no number"


def text(pattern: str = r"(?s).*") -> Kind:
    """A string, all of which the regular expression matches."""
    return lambda value: (
        "" if isinstance(value, str) and re.fullmatch(pattern, value) else f" is {value!r:.80}, no text of this form"
    )


def switch(value: Any) -> str:
    """True or False."""
    return "" if isinstance(value, bool) else f" is {value!r:.80}, neither true nor false"


def items(kind: Kind) -> Kind:
    """A list."""

    def check(value: Any) -> str:
        if not isinstance(value, list):
            return f" is {value!r:.80}, no list"
        return next((f"[{at}]{problem}" for at, one in enumerate(value) if (problem := kind(one))), "")

    return check


def mapping(kind: Kind) -> Kind:
    """An object with any keys."""

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return f" is {value!r:.80}, no object"
        return next((f".{key}{problem}" for key, one in value.items() if (problem := kind(one))), "")

    return check


def record(fields: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, other: Kind | None = None) -> Kind:
    """An object with these keys; with others too where ``other`` says what they hold."""
    known = {**fields, **(optional or {})}

    def problems(value: dict[str, Any]) -> Iterator[str]:
        yield from (f".{key} is missing" for key in fields if key not in value)
        for key, one in value.items():
            kind = known.get(key, other)
            yield f".{key} is not known" if kind is None else f".{key}{problem}" if (problem := kind(one)) else ""

    return lambda value: (
        next(filter(None, problems(value)), "") if isinstance(value, dict) else f" is {value!r:.80}, no object"
    )


def value_of_group(value: Any) -> str:
    """A value of a param group: what JSON holds; trees of ``state_codec`` as texts. Ranges are the optimizer's own."""
    if isinstance(value, list):
        return items(value_of_group)(value)
    if not isinstance(value, dict):
        return ""
    if value.keys() == {"tensor"}:
        return record({"tensor": text("groups/.*")})(value)
    if value.keys() == {"tuple"}:
        return record({"tuple": items(value_of_group)})(value)
    return record({}, {STRUCTURE: tree}, value_of_group)(value)


def scalar(value: Any) -> str:
    """A number of a state, also one that has overflowed in training; or a text, True, False, None."""
    is_one = value is None or isinstance(value, (bool, int, float, str))
    return "" if is_one else f" is {value!r:.80}, no number or text"


def tree(value: Any) -> str:
    """The text of a tree, as ``state_codec`` has them."""
    try:
        return "" if isinstance(json.loads(value), dict) else f" is {value!r:.80}, no tree"
    except (TypeError, ValueError, RecursionError) as error:
        return f" is no text of a tree ({type(error).__name__})"


def census(scalars: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Of how many parameters there is a number of this name, by its type: what a record has lost, or got, is found."""
    found: dict[str, dict[str, int]] = {}
    for own in scalars.values():
        for key, value in own.items():
            kinds = found.setdefault(key, {})
            kinds[type(value).__name__] = kinds.get(type(value).__name__, 0) + 1
    return found


SHA256, WORD, NAME = text("[0-9a-f]{64}"), text("[0-9a-f]{32}"), text("(?s).+")
SEAL = record({"index": SHA256, "files": mapping(text("([0-9a-f]{8})+"))})
_HEAD = {"format": count(1), "identity": WORD, "optimizer": NAME}

ENGINE = record({}, {"loss_scale": mapping(number)}, other=count())

CHECKPOINT = record({**_HEAD, "steps": count(), "world_size": count(1), "model": SEAL, "parts": mapping(SHA256)})
FOLDER = record(
    {
        "format": count(1),
        "saved_at_ns": count(),
        "parts": mapping(mapping(record({"bytes": count(), "sums": text("([0-9a-f]{8})*")}))),
    }
)
OPTIMIZER = record(
    {
        **_HEAD,
        "num_steps": count(),
        "mode": text("train|eval"),
        "counters": items(NAME),
        "param_groups": items(record({"params": items(text())}, other=value_of_group)),
        "build": items(mapping(value_of_group)),
        "shapes": mapping(items(count())),
        "scalars": mapping(mapping(scalar)),
        "census": mapping(mapping(count(1))),
        "memory_orders": mapping(items(count())),
        "tensors": SEAL,
    },
    {"extras": tree, "engine": ENGINE, "stepped": record({"independent": switch, "reason": text()})},
)
