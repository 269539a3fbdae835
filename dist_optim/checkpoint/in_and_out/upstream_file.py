"""Files that ``torch.save`` has written: opened with an allow-list, always, and written so that they open with one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_optim.errors import CheckpointError, UnsupportedError
from dist_optim.specs.registry import OptimizerSpec

__all__ = ["load_plain", "loading_text", "state_classes_of", "write_state_dict"]

Allowed = type | Callable[..., Any] | tuple[Any, str]


def load_plain(path: Path, allowed: Iterable[Allowed] = ()) -> Any:
    """What a file holds: tensors (on the file's pages, where it allows that), numbers, texts, and containers of them.

    Args:
        path: The file.
        allowed: Classes that it may name besides; a pair means that the text stands for the class in it.

    Raises:
        CheckpointError: It is missing or damaged, or names code.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # of torch before 1.6
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {str(path)!r}.") from error
    except Exception as error:  # damaged bytes raise almost anything
        raise CheckpointError(
            f"{str(path)!r} cannot be read with weights_only=True, and is read in no other way: "
            f"{type(error).__name__}: {_first_line(error)}. Save plain state dicts, and nothing that is code."
        ) from error


def write_state_dict(path: Path, state_dict: Mapping[str, Any]) -> list[type]:
    """Write it, and prove that it opens with an allow-list of data classes.

    Returns:
        The classes of upstream's that whoever loads it has to allow; mostly none.

    Raises:
        UnsupportedError: It names code.
    """
    torch.save(state_dict, path)
    named = [_class_named(one) for one in torch.serialization.get_unsafe_globals_in_checkpoint(str(path))]
    try:
        load_plain(path, named)
    except CheckpointError as error:
        raise UnsupportedError(
            f"What upstream's state_dict() returned could not be loaded safely ({error}). Export the weights alone "
            "(--only weights)."
        ) from error
    return named


def loading_text(file: str, classes: Iterable[type]) -> str:
    """How the file is loaded, in Python."""
    names = [f"{one.__module__}.{one.__qualname__}" for one in classes]
    load = f"optimizer.load_state_dict(torch.load({file!r}, weights_only=True))"
    return f"with torch.serialization.safe_globals([{', '.join(names)}]): {load}" if names else load


def state_classes_of(specs: Iterable[OptimizerSpec]) -> list[type]:
    """Classes of objects that these optimizers keep in their state."""
    return list(dict.fromkeys(one for spec in specs for one in spec.driver.state_classes()))


def _class_named(text: str) -> Any:
    module, _, name = text.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise UnsupportedError(
            f"What upstream's state_dict() returned names {text}, which is no class of data. Export the weights alone "
            "(--only weights)."
        )
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else ""
