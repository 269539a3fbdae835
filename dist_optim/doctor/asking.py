"""Rules made of the code that refuses at run time: it is asked, and asked again of what may serve instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_optim.doctor.finding import Change, Finding, Rule, applied
from dist_optim.doctor.subject import Subject
from dist_optim.errors import DistOptimError

__all__ = ["Remedy", "asking", "refusal_of"]

Check = Callable[[Subject], str]
"""What run-time code says of a configuration; empty where it takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Changes that may be what serves, under the code of what they mend."""

    code: str
    changes: Callable[[Subject], Iterable[Change]]
    example: Mapping[str, Any] = field(default_factory=dict)


def asking(check: Check, *remedies: Remedy) -> tuple[Rule, ...]:
    """A rule for each remedy: it finds something where the check refuses, and says something else once it is applied.

    What none of them mends is found by the first rule, without changes.
    """
    return tuple(_rule(check, number, remedies) for number in range(len(remedies)))


def _rule(check: Check, number: int, remedies: tuple[Remedy, ...]) -> Rule:
    own = remedies[number]

    def find(subject: Subject) -> Iterator[Finding]:
        reason = check(subject)
        if not reason:
            return
        served = next((one for one in remedies if _helps(check, subject, reason, one)), None)
        if served is own:
            yield Finding(code=own.code, reason=reason, changes=tuple(own.changes(subject)))
        elif served is None and number == 0:
            yield Finding(code=own.code, reason=reason)

    return Rule(code=own.code, find=find, example=own.example)


def _helps(check: Check, subject: Subject, reason: str, remedy: Remedy) -> bool:
    changes = tuple(remedy.changes(subject))
    return bool(changes) and check(applied(subject, changes)) != reason


def refusal_of(action: Callable[[], object]) -> str:
    """What an action of dist_optim's is refused with; empty where it is not."""
    try:
        action()
    except DistOptimError as error:
        return str(error)
    return ""
