"""Classes whose verdict is known by name and version, since ``docs/any-optimizer.md`` was measured: nothing is tried.

It holds for the class's own defaults, at any learning rate, and for the source files that were measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dist_optim.proving.cache import sources_of
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec, signature_records
from dist_optim.specs.verdict import Verdict

__all__ = ["FILE", "as_known", "known_verdict", "without_roots"]

FILE = Path(__file__).with_name("known.json")
"""Written by ``make any-optimizer``: by class, the digest of its sources and its verdict."""


def known_verdict(spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> Verdict | None:
    """The verdict of a class that was measured, as it is to be built here; None where it has to be proven.

    Args:
        spec: Of the class.
        groups: The param groups that it will get.
        arguments: Its constructor's keywords.
    """
    optimizer_class = spec.load_class()
    entry = _entries().get(_name(optimizer_class)) if isinstance(optimizer_class, type) else None
    if entry is None or not _is_default(optimizer_class, groups, arguments):
        return None
    if entry["sources"] != _marks(optimizer_class):
        return None
    values = {**entry["verdict"], "name": spec.name}
    unreached = {_placed(name): tuple(lines) for name, lines in values.pop("unreached").items()}
    return Verdict(**values, unreached=unreached)


def as_known(optimizer_class: type, verdict: Verdict) -> tuple[str, dict[str, Any]] | None:
    """What ``known.json`` holds of a class; None where its sources cannot be told apart from others."""
    sources = _marks(optimizer_class)
    unreached = {_portable(name): list(lines) for name, lines in verdict.unreached.items()}
    if not sources or "" in unreached:
        return None
    values = asdict(replace(verdict, evidence={}))
    values = {key: value for key, value in values.items() if key not in ("evidence", "name")}
    values["reason"] = without_roots(verdict.reason)
    return _name(optimizer_class), {"sources": sources, "verdict": {**values, "unreached": unreached}}


def without_roots(text: str) -> str:
    """A text without the folders that packages are installed in."""
    for root in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(root.rstrip(os.sep) + os.sep, "")
    return text


@lru_cache(maxsize=1)
def _entries() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(FILE.read_text())
    except OSError:
        return {}
    return found


def _name(optimizer_class: type) -> str:
    return f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"


def _is_default(optimizer_class: type, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> bool:
    """Whether all but the learning rate is as the class has it."""
    defaults = {record.name: record.default for record in signature_records(optimizer_class)}
    own = {key for group in groups for key in group} - {"params", "lr"}
    given = {key: value for key, value in arguments.items() if key != "lr"}
    return not own and all(value is defaults[key] or bool(value == defaults[key]) for key, value in given.items())


def _marks(optimizer_class: type) -> list[str]:
    """Digests of the class's files; of torch's own, the version."""
    sources = sources_of(optimizer_class)
    return [f"torch {torch.__version__.partition('+')[0]}"] if sources == ["torch"] else sources


def _portable(name: str) -> str:
    """A path below an installed package, from the package on; empty for any other."""
    for root in sys.path:
        if root and name.startswith(root.rstrip(os.sep) + os.sep):
            return name[len(root.rstrip(os.sep)) + 1 :].replace(os.sep, "/")
    return ""


def _placed(name: str) -> str:
    """Where that file, or folder, is here."""
    package, _, rest = name.partition("/")
    module = sys.modules.get(package)
    folders = list(getattr(module, "__path__", []))
    return os.path.join(folders[0], *rest.split("/")) if folders else name
