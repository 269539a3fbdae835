"""Switches that launchers set in the environment."""

from __future__ import annotations

import os

__all__ = ["is_switched_on"]


def is_switched_on(name: str) -> bool:
    """Whether the variable is there and says yes, as accelerate reads its own."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
