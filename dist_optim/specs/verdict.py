"""What was shown of an optimizer that nobody described: how it may be stepped on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Ghosts", "Verdict"]

Ghosts = Literal["none", "empty", "with gradients"]
"""What stands in an instance for a tensor that another rank steps: nothing, an empty parameter, or one that also has an
(empty) gradient, for classes that count positions among the parameters with a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of ``dist_optim.testing.prove``, for one class with one set of arguments.

    Where tensors are independent, each may be stepped by a rank of its own. Otherwise one rank steps them all, with the
    unmodified class: exact by construction, and not sharded.
    """

    name: str
    is_independent: bool
    reason: str
    """How independence was shown, or what speaks against it: one sentence, for the audit."""
    refusal: str = ""
    """Why the class cannot be served on several ranks at all, and what to do; empty where it can."""
    ghosts: Ghosts = "none"
    """Under which its tensors, stepped apart, moved as together."""
    steps_absent: bool = False
    """It also changes parameters (or their state) that have no gradient in a step."""
    draws: bool = False
    """It draws random numbers."""
    needs_closure: bool = False
    """``step()`` without a closure fails."""
    evaluations: int = 0
    """How often a step evaluated the closure that it was given, at most; 0 where it ignores it."""
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Lines of the class's code that the proof never executed, by file; a step that reaches one of them is unproven."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What was run and seen: counts of steps, operations and host reads, the scenarios, and the differences found."""
