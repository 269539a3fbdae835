"""The patch of a configuration: as text, and written, each file whole or not at all."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_optim.doctor.reading import IN_ARGUMENTS
from dist_optim.doctor.subject import Subject
from dist_optim.errors import UsageError
from dist_optim.files import written_whole

__all__ = ["flags_of", "patch_of", "write"]


def patch_of(before: Subject, after: Subject) -> str:
    """What changes, as unified differences of the files; flags that are in no file as a line."""
    lines: list[str] = []
    for path, old, new in _texts(before, after):
        name = str(path)
        lines += difflib.unified_diff(old.splitlines(), new.splitlines(), name, name, lineterm="", n=2)
    if "arguments" not in before.files and before.arguments != after.arguments:
        lines += ["flags:", f"- {flags_of(before.arguments)}", f"+ {flags_of(after.arguments)}"]
    return "\n".join(lines)


def write(before: Subject, after: Subject) -> list[Path]:
    """Write the files that change, each whole or not at all.

    Raises:
        UsageError: One cannot be written; those before it are.
    """
    written = []
    for path, _, new in _texts(before, after):
        try:
            with written_whole(path) as draft:
                draft.write_text(new, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{str(path)!r} cannot be written: {error}") from error
        written.append(path)
    return written


def _texts(before: Subject, after: Subject) -> list[tuple[Path, str, str]]:
    """Files that change, with their text now and then."""
    found = []
    for part, path in before.files.items():
        old, new = getattr(before, part), getattr(after, part)
        if part == "arguments" and "deepspeed" not in before.files and isinstance(old.get(IN_ARGUMENTS), Mapping):
            new = {**new, IN_ARGUMENTS: after.deepspeed}
        if old != new:
            text = path.read_text(encoding="utf-8")
            found.append((path, text, _written(text, new, path)))
    return found


def _written(text: str, data: Mapping[str, Any], path: Path) -> str:
    if path.suffix == ".json":
        return json.dumps(data, indent=2) + "\n"
    edited = _edited(text, yaml.safe_load(text), data)
    if edited is not None and yaml.safe_load(edited) == data:
        return edited
    comments = "".join(f"{line}\n" for line in text.splitlines() if line.startswith("#"))
    return comments + yaml.safe_dump(dict(data), sort_keys=False)


def _edited(text: str, old: Mapping[str, Any], new: Mapping[str, Any], parent: str = "") -> str | None:
    """YAML with only the lines of what differs changed, so that comments stay; None where that is not to be done."""
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if before == after and (key in old) == (key in new):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and not parent:
            inner = _edited(text, before, after, str(key))
        elif isinstance(before, (Mapping, list)) or isinstance(after, (Mapping, list)):
            return None
        else:
            inner = _with_line(text, parent, str(key), None if key not in new else _scalar(after), key in old)
        if inner is None:
            return None
        text = inner
    return text


def _with_line(text: str, parent: str, key: str, value: str | None, is_there: bool) -> str | None:
    """The text with the entry's one line changed, added or taken out; None where it has no such line."""
    indent = "  " if parent else ""
    line = re.compile(rf"^{indent}{re.escape(key)}:[^#\n]*?(?P<comment> *#.*)?\n", re.MULTILINE)
    if not is_there:
        entry = f"{indent}{key}: {value}\n"
        head = re.compile(rf"^{re.escape(parent)}:.*\n", re.MULTILINE)
        return head.sub(lambda found: found[0] + entry, text, count=1) if parent else f"{text.rstrip()}\n{entry}"
    if len(line.findall(text)) != 1:
        return None
    return line.sub(lambda found: "" if value is None else f"{indent}{key}: {value}{found['comment'] or ''}\n", text)


def _scalar(value: Any) -> str:
    return str(yaml.safe_dump(value)).removesuffix("\n").removesuffix("...").strip()


def flags_of(arguments: Mapping[str, Any]) -> str:
    """Flags as they are written on a command line."""
    words = []
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            value = (
                ", ".join(f"{key}={one!r}" for key, one in value.items()) if name == "optim_args" else json.dumps(value)
            )
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words.append(" ".join([f"--{name}", *map(str, value)]))
        else:
            words.append(f'--{name} "{value}"' if isinstance(value, str) and " " in value else f"--{name} {value}")
    return " ".join(words)
