"""Verdicts that are kept: in the process, and in a file for later ones.

A verdict holds for one class and its source, one version of its package, of torch, of Python and of the proof, one set
of arguments, and one structure of groups. Where one of these cannot be written down, nothing is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_optim.proving.scenario import scenarios_of
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.verdict import Verdict
from dist_optim.stepping.own_code import OwnCode

__all__ = ["VARIABLE", "remembered", "sources_of"]

VARIABLE = "DIST_OPTIM_PROOF_CACHE"
"""The folder of the files, instead of one below the user's cache; set and empty for none."""

_in_process: dict[tuple[type, str], Verdict] = {}


def remembered(
    spec: OptimizerSpec,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    kinds: Sequence[str],
    prove: Callable[[], Verdict],
) -> Verdict:
    """The verdict that is kept, or what ``prove`` returns; a file that cannot be read or written is as none."""
    optimizer_class = spec.load_class()
    if spec.makes is not None:  # a function that builds one: nobody knows what it reads
        return prove()
    digest = _digest(spec, optimizer_class, groups, arguments, kinds)
    if digest is None:
        return prove()
    key = (optimizer_class, digest)
    if key not in _in_process:
        path = _file(optimizer_class, digest)
        verdict = None if path is None else _read(path)
        if verdict is None:
            verdict = prove()
            if path is not None:
                _write(path, verdict)
        _in_process[key] = verdict
    return _in_process[key]


def _file(optimizer_class: type, digest: str) -> Path | None:
    """Where the verdict is kept; None for classes that another process may not find the same again."""
    if "<locals>" in optimizer_class.__qualname__ or not sources_of(optimizer_class):
        return None
    folder = os.environ.get(VARIABLE)
    if folder == "":
        return None
    if folder is None:
        folder = os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dist_optim", "proofs"
        )
    return Path(folder) / f"{digest}.json"


def _read(path: Path) -> Verdict | None:
    try:
        values = json.loads(path.read_text())
        values["unreached"] = {place: tuple(lines) for place, lines in values["unreached"].items()}
        return Verdict(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, verdict: Verdict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(asdict(verdict), file)
        os.replace(file.name, path)
    except (OSError, TypeError, ValueError):
        return


# What a verdict holds for ------------------------------------------------------------------------------------------


def _digest(
    spec: OptimizerSpec,
    optimizer_class: type,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    kinds: Sequence[str],
) -> str | None:
    try:
        given = [
            spec.name,
            f"{type(spec.driver).__module__}.{type(spec.driver).__qualname__}",
            sorted(trait.name for trait in spec.traits),
            f"{optimizer_class.__module__}.{optimizer_class.__qualname__}",
            _version(optimizer_class),
            [torch.__version__, platform.python_version(), platform.machine(), _own_digest()],
            sources_of(optimizer_class),
            _plain_but_defaults(arguments, optimizer_class),
            _structure(groups, optimizer_class),
            list(kinds),
            [torch.get_default_dtype(), torch.get_num_threads()],
        ]
        return hashlib.sha256(json.dumps(given, default=str).encode()).hexdigest()
    except _NotPlainError:
        return None


class _NotPlainError(Exception):
    pass


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, without loss.

    Raises:
        _NotPlainError: It is an object of which nobody knows when another is equal.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, complex, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, Mapping):
        return [[str(key), _plain(one)] for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_plain(one) for one in value)]
    if isinstance(value, Tensor) and value.numel() == 1:
        return [str(value.dtype), repr(value.item())]
    raise _NotPlainError


def _plain_but_defaults(values: Mapping[str, Any], optimizer_class: type) -> Any:
    """As ``_plain``; what is the class's own default, an object that stands for "not given" say, its source tells."""
    try:
        defaults = {name: one.default for name, one in inspect.signature(optimizer_class).parameters.items()}
    except (TypeError, ValueError):
        defaults = {}
    found = []
    for key, value in values.items():
        try:
            found.append([key, _plain(value)])
        except _NotPlainError:
            if value is not defaults.get(key):
                raise
            found.append([key, "its default"])
    return found


def _structure(groups: Sequence[ParamGroup], optimizer_class: type) -> Any:
    """Values, and what the tiny tensors are like: models whose proof would run alike share it."""
    scenarios = scenarios_of(groups)
    shapes = [[[list(one.shape), str(one.dtype), one.device.type] for one in scenario.placed] for scenario in scenarios]
    counts = [[len(group["params"]) for group in scenario.groups] for scenario in scenarios]
    kept = [{key: value for key, value in group.items() if key != "params"} for group in scenarios[0].groups]
    values = [_plain_but_defaults(one, optimizer_class) for one in kept]
    return [shapes, counts, values]


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Of each package; read once, as every installed one is looked through."""
    return importlib.metadata.packages_distributions()


def _version(optimizer_class: type) -> str:
    package = optimizer_class.__module__.partition(".")[0]
    names = _distributions().get(package, [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


def sources_of(optimizer_class: type) -> list[str]:
    """Digests of the files that hold the class and its bases; of torch's own, its version speaks."""
    if optimizer_class.__module__.startswith("torch."):
        return ["torch"]
    try:
        return [_file_digest(name) for name in sorted(OwnCode.of(optimizer_class).files)]
    except OSError:
        return []


@lru_cache(maxsize=256)
def _file_digest(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def _own_digest() -> str:
    """Of the proof itself: another one comes to other verdicts."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
