"""From what accelerate and DeepSpeed put around an optimizer to the optimizer itself."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.optim import Optimizer

__all__ = ["find_optimizer"]

Kind = TypeVar("Kind", bound=Optimizer)


def find_optimizer(given: Any, kind: type[Kind]) -> Kind | None:
    """The first optimizer of this kind from the outside in, past wrappers; None where there is none.

    accelerate's wrapper is an ``Optimizer`` itself, whose state and steps are not its own: it never counts as one.
    """
    inner = given
    while inner is not None:
        if isinstance(inner, kind) and not type(inner).__module__.startswith("accelerate."):
            return inner
        inner = getattr(inner, "optimizer", None)
    return None
