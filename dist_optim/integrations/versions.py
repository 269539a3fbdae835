"""Which packages this rank has, to compare ranks by: another version may compute something else."""

from __future__ import annotations

import platform

from dist_optim.building.alike import COMPARED_PACKAGES, version_of
from dist_optim.specs.registry import get_spec, names

__all__ = ["versions"]


def versions(optimizer: str) -> list[tuple[str, str]]:
    """(package, version) of Python, of the frameworks, and of what this optimizer is made of, where it is a name."""
    own = [get_spec(optimizer).package] if optimizer in names() else []
    packages = dict.fromkeys((*COMPARED_PACKAGES, *own))
    return [("python", platform.python_version()), *((package, version_of(package)) for package in packages)]
