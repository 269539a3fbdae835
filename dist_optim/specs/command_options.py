"""Options that several commands take, and what their texts mean. Needs typer."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer

from dist_optim.errors import UsageError

__all__ = ["OptimArgs", "TargetModules", "choice_of", "listed", "targets_of"]

OptimArgs = Annotated[str | None, typer.Option("--optim_args", help='As in training: "rank=64, betas=(0.9, 0.99)".')]
TargetModules = Annotated[  # of commands that build an optimizer: `import` reads what was built, and has no default
    str | None,
    typer.Option(
        "--optim_target_modules",
        "--target_modules",
        help="As in training: all-linear, or attn,mlp. Default: all-linear, where it is due.",
    ),
]


def listed(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def targets_of(text: str | None) -> str | list[str] | None:
    """As ``build_optimizer`` takes ``target_modules``."""
    parts = listed(text)
    return None if not parts else parts[0] if parts == ["all-linear"] else parts


def choice_of(text: str) -> Any:
    """A registered name as it is; ``package.module:Class`` or ``package.module.Class`` as the class.

    Raises:
        UsageError: It cannot be imported.
    """
    module, _, name = text.partition(":") if ":" in text else text.rpartition(".")
    if not module:
        return text
    sys.path.insert(0, os.getcwd())  # a command of pip's does not look there, and the user's class may be there
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--optim {text!r} cannot be imported: {error}.") from error
