"""From files and flags to a ``Subject``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_optim.doctor.machine import machine
from dist_optim.doctor.subject import Subject, kind_of
from dist_optim.errors import UsageError

__all__ = ["IN_ARGUMENTS", "read_subject"]

IN_ARGUMENTS = "deepspeed"
"""A flag that holds DeepSpeed's configuration, or names its file."""


def read_subject(files: Sequence[Path], words: Sequence[str]) -> Subject:
    """What is to be examined.

    Args:
        files: Of any of the four kinds, in any order; a folder stands for its config.json.
        words: The script's flags.

    Raises:
        UsageError: A file cannot be read, or two are of one kind.
    """
    parts: dict[str, Any] = {}
    places: dict[str, Path] = {}
    for name in files:
        path = name / "config.json" if name.is_dir() else name
        data = _read(path)
        kind = kind_of(data, path)
        if kind in parts:
            raise UsageError(f"{str(path)!r} and {str(places[kind])!r} are both {_SAID[kind]}. Give one of them.")
        parts[kind], places[kind] = dict(data), path
    arguments = {**parts.pop("arguments", {}), **_flags_in(words)}
    parts, places = _with_named_files(arguments, parts, places)
    here = machine(arguments.get("output_dir"))
    return Subject(arguments=arguments, environment=here, files=places, **parts)


_SAID = {
    "accelerate": "files of accelerate's",
    "deepspeed": "configurations of DeepSpeed's",
    "model": "configs of models",
    "arguments": "files of arguments",
}


def _with_named_files(
    arguments: Mapping[str, Any], parts: dict[str, Any], places: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """And the files that the flags, or accelerate's file, name."""
    launcher = parts.get("accelerate", {}).get("deepspeed_config") or {}
    named = arguments.get(IN_ARGUMENTS) or launcher.get("deepspeed_config_file")
    if "deepspeed" not in parts and isinstance(named, Mapping):
        return {**parts, "deepspeed": dict(named)}, places
    wanted = {"deepspeed": named, "model": arguments.get("model_config")}
    for kind, name in wanted.items():
        if kind not in parts and isinstance(name, str) and Path(name).is_file():
            parts, places = {**parts, kind: dict(_read(Path(name)))}, {**places, kind: Path(name)}
    return parts, places


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from error


def _flags_in(words: Sequence[str]) -> dict[str, Any]:
    """Flags by name; values as Python has them: a flag alone is True, one with several values a list."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _value(value) if value else []
        elif name:
            found[name] = [*found[name], _value(word)] if isinstance(found[name], list) else [found[name], _value(word)]
        elif not word.endswith(".py"):
            raise UsageError(f"{word!r} is no flag. Give the script's own flags after --, as: -- --optim galore_adamw.")
    return {key: _single(value, key) for key, value in found.items()}


def _single(value: Any, name: str) -> Any:
    if not isinstance(value, list):
        return value
    return True if not value else value[0] if len(value) == 1 and name != "optim_target_modules" else value


def _value(word: str) -> Any:
    """A number or a truth value; other text stays text, as does what reads like a list of hyperparameters."""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word):
        return float(word) if re.search(r"[.eE]", word) else int(word)
    return {"true": True, "false": False}.get(word.lower(), word)
