"""Dataclasses of arguments from flags, from one `.yaml` or `.json` file, or from both, in two parts.

``read_flags`` gives plain values, which ranks can compare first; ``make_dataclasses`` makes the dataclasses, of which
``TrainingArguments`` looks for the rank's device and peers. Every mistake is one ``UsageError``; nothing is printed and
no process exits from here.
"""

from __future__ import annotations

import difflib
import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from dist_optim.errors import UsageError

__all__ = ["make_dataclasses", "read_flags"]


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit, so that one rank speaks for all."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See --help.")


def read_flags(kinds: Sequence[Any], argv: Sequence[str]) -> Namespace:
    """The values of all fields by name, and in ``given`` the names of those that the user set.

    A `.yaml` or `.json` file among the flags holds flags by their names; flags beside it override it.

    Args:
        kinds: Dataclasses, as ``HfArgumentParser`` takes them.
        argv: The words of the command line.

    Raises:
        UsageError: An argument is unknown (the nearest known one is named), or its value of a wrong type.
    """
    argv, parser = list(argv), _Parser(kinds, allow_abbrev=False)
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # argparse takes it for an empty list, of any type
            raise UsageError(f"{word[:-3]} is given '--', which is no value. See --help.")
    known = [item.name for kind in kinds for item in fields(kind) if item.init]
    asked, unknown = parser.parse_known_args(argv)
    for file in [word for word in unknown if word.endswith((".json", ".yaml", ".yml")) and word[0] != "-"][:1]:
        at = argv.index(file)
        argv = [*_flags_of_file(file, known), *argv[:at], *argv[at + 1 :]]
        asked, unknown = parser.parse_known_args(argv)
    _refuse_unknown(unknown, known)
    flags = (flag[2:].partition("=")[0].replace("-", "_") for flag in argv if flag.startswith("--"))
    asked.given = sorted({name.removeprefix("no_") for name in flags})
    return asked


def make_dataclasses(kinds: Sequence[Any], asked: Namespace) -> tuple[Any, ...]:
    """One object a kind, from what ``read_flags`` gave; their ``__post_init__`` checks the values."""
    values = {name: value for name, value in vars(asked).items() if name != "given"}
    return tuple(_Parser(kinds).parse_dict(values))


def _flags_of_file(path: str, known: Iterable[str]) -> list[str]:
    """The file's entries as flags, so that both ways check types alike."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The arguments file {path!r} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"The arguments file {path!r} must hold one mapping of argument names to values.")
    _refuse_unknown([f"--{key}" for key in entries if key not in known], known)
    argv: list[str] = []
    for key, value in entries.items():
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _refuse_unknown(arguments: Sequence[str], known: Iterable[str]) -> None:
    if arguments:
        near = difflib.get_close_matches(arguments[0].lstrip("-").split("=")[0], list(known), n=3)
        hint = f"Did you mean: {', '.join('--' + other for other in near)}?" if near else "See --help for all of them."
        raise UsageError(f"Unknown argument {arguments[0]!r}. {hint}")
