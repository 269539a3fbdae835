"""Hyperparameters as typed records: what may be set, how strings are read, and which values are refused."""

from __future__ import annotations

import ast
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from dist_optim.errors import HyperparameterError

__all__ = ["WRITE_ANOTHER", "Hyperparameter", "Scope", "check_hyperparameters", "parse_optim_args", "problem_of"]


WRITE_ANOTHER = " Write an allowed value before step(), on all ranks. No parameter was changed."
"""What to do about a value that somebody has written into a param group."""


class Scope(Enum):
    """Where upstream reads a hyperparameter."""

    GROUP = "group"
    """A constructor argument that also lives in every param group: a schedule may change it."""
    MATRIX = "matrix"
    """A key of the param groups that hold low-rank matrices, absent from all others (rank, update_proj_gap, ...)."""
    CONSTRUCTOR = "constructor"
    """A constructor argument only: the same for all groups, and fixed for the life of the optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """One hyperparameter under upstream's own name.

    ``kind`` is one of ``float, int, bool, str``, ``floats`` (a tuple of ``length`` numbers) or ``any`` (all but numbers
    that are not finite). Bounds are those of the value, or of each number of a tuple; an open bound excludes its end.
    A number that is infinite or NaN is never allowed, unless the default is.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    scope: Scope = Scope.GROUP
    minimum: float = -math.inf
    maximum: float = math.inf
    minimum_open: bool = False
    maximum_open: bool = False
    choices: tuple[Any, ...] = ()
    length: int = 2
    optional: bool = False
    """``None`` is a legal value."""
    required: bool = False
    """There is no default: the user must give a value."""
    is_inherited: bool = False
    """Of a base that the class's ``**keywords`` reach: passed on where it is given, and only there."""

    def describe_type(self) -> str:
        """The legal values in words, for error messages and ``dist-optim list``."""
        text = f"{self.length} floats" if self.kind == "floats" else self.kind
        if self.choices:
            text += " in {" + ", ".join(repr(choice) for choice in self.choices) + "}"
        if self.minimum > -math.inf:
            text += f" {'>' if self.minimum_open else '>='} {self.minimum:g}"
        if self.maximum < math.inf:
            text += (
                f"{' and' if self.minimum > -math.inf else ''} {'<' if self.maximum_open else '<='} {self.maximum:g}"
            )
        return text + (" or None" if self.optional else "")

    def check(self, value: Any, optimizer_name: str) -> Any:
        """Return ``value`` as upstream wants it.

        A string is read as the literal it spells, so that ``"False"`` is False. An int serves where a float is asked;
        nothing else is converted.

        Raises:
            HyperparameterError: The value has another type or is out of range.
        """
        if isinstance(value, str) and self.kind not in ("any", "str"):
            value = _read_literal(value)
        if not self.allows(value):
            raise HyperparameterError(f"{optimizer_name}: {self.name}={self.refusal(value)}")
        return value if value is None or self.kind == "any" or self._is_default(value) else self._converted(value)

    def allows(self, value: Any) -> bool:
        """Whether upstream may be given this value, without reading a string as something else."""
        if self.kind == "any":
            is_default = value is self.default or self._is_default(value)
            return is_default or _has_no_infinity(value)
        if self._is_default(value):
            return True
        if value is None:
            return self.optional
        converted = self._converted(value)
        return converted is not None and self._in_range(converted)

    def refusal(self, value: Any) -> str:
        """What to say of a value that is not allowed."""
        allowed = "finite" if self.kind == "any" else self.describe_type()
        return (
            f"{value!r} ({type(value).__name__}) is not allowed. {self.name} is {allowed} (default {self.default!r}): "
            f"{self.meaning}"
        )

    def _is_default(self, value: Any) -> bool:
        """Also an infinite one; in the default's own type."""
        return isinstance(value, float) and isinstance(self.default, float) and value == self.default

    def _converted(self, value: Any) -> Any:
        if self.kind == "floats":
            sized = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == self.length
            return tuple(float(v) for v in value) if sized and all(_is_number(v) for v in value) else None
        if self.kind == "float":
            return float(value) if _is_number(value) else None
        if self.kind == "int":
            return int(value) if not isinstance(value, bool) and isinstance(value, numbers.Integral) else None
        expected = {"bool": bool, "str": str}[self.kind]
        return value if isinstance(value, expected) else None

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind in ("bool", "str"):
            return True
        numbers = value if self.kind == "floats" else (value,)
        above = all(n > self.minimum if self.minimum_open else n >= self.minimum for n in numbers)
        return above and all(n < self.maximum if self.maximum_open else n <= self.maximum for n in numbers)


def check_hyperparameters(
    optimizer_name: str, known: Sequence[Hyperparameter], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Check every given value against its record.

    Raises:
        HyperparameterError: A key is unknown (the known ones are listed) or a value is not allowed.
    """
    records = {record.name: record for record in known}
    for key in given:
        if key not in records:
            raise HyperparameterError(unknown_key_message(optimizer_name, key, records.values()))
    return {key: records[key].check(value, optimizer_name) for key, value in given.items()}


def problem_of(
    optimizer_name: str,
    known: Callable[[Mapping[str, Any]], Iterable[Hyperparameter]],
    groups: Iterable[Mapping[str, Any]],
) -> HyperparameterError | None:
    """What is wrong with the values that param groups hold now, where someone wrote another one; None if nothing.

    Local, and before a step. A tensor stands for the number in it; a string is not read as one: upstream would not.

    Args:
        optimizer_name: For the message.
        known: The hyperparameters of a group.
        groups: As the user sees them.
    """
    for number, group in enumerate(groups):
        for record in known(group):
            value = group.get(record.name, record)
            plain = value.tolist() if isinstance(value, Tensor) else value
            if value is not record and not record.allows(plain):
                where = f"{optimizer_name}: param_groups[{number}][{record.name!r}]"
                return HyperparameterError(f"{where} = {record.refusal(plain)}.{WRITE_ANOTHER}")
    return None


def unknown_key_message(optimizer_name: str, key: object, known: Iterable[Hyperparameter]) -> str:
    """What to say of a key that the optimizer does not have."""
    records = list(known)
    near = difflib.get_close_matches(str(key), [record.name for record in records], n=1)
    listing = ", ".join(f"{record.name} ({record.describe_type()})" for record in records)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{optimizer_name} has no hyperparameter {key!r}.{hint} Known: {listing}."


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """Read ``"rank=64, scale=0.25, betas=(0.9, 0.99), proj_type=std"`` into typed values.

    Values are Python literals where they spell one (numbers, True/False in any case, None, tuples, quoted strings), and
    plain strings otherwise. An empty text gives an empty dict.

    Raises:
        HyperparameterError: A part has no ``=``, an empty key, or repeats a key.
    """
    parsed: dict[str, Any] = {}
    for part in _split_at_commas(text or ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise HyperparameterError(
                f"optim_args: cannot read {part.strip()!r}. Write key=value pairs separated by commas, "
                'for example "rank=64, scale=0.25".'
            )
        if key in parsed:
            raise HyperparameterError(f"optim_args: {key!r} is given twice. Keep one of the two values.")
        parsed[key] = _read_literal(value)
    return parsed


def _split_at_commas(text: str) -> list[str]:
    """Parts between the commas that stand outside brackets and quotes; blank text has none."""
    parts, depth, quote, start = [], 0, "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()] if text.strip() else []


def _read_literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _has_no_infinity(value: Any) -> bool:
    """Of a value whose kind nobody described: no number in it is infinite or NaN."""
    listed = value if isinstance(value, (list, tuple)) else (value,)
    return all(_is_number(one) for one in listed if not isinstance(one, bool) and isinstance(one, numbers.Real))
