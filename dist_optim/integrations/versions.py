"""Which packages this rank has, to compare ranks by: another version may compute something else."""

from __future__ import annotations

import platform
from importlib import metadata

from dist_optim.specs.registry import get_spec, names

__all__ = ["versions"]

FRAMEWORKS = ("dist-optim", "torch", "transformers", "accelerate", "deepspeed")


def versions(optimizer: str) -> list[tuple[str, str]]:
    """(package, version) of Python, of the frameworks, and of what this optimizer is made of, where it is a name."""
    found = [("python", platform.python_version())]
    for package in (*FRAMEWORKS, *([get_spec(optimizer).package] if optimizer in names() else [])):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return list(dict(found).items())
