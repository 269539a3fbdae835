"""Which matrices a low-rank optimizer takes: ``target_modules`` as users know it from transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from dist_optim.errors import TargetModulesError
from dist_optim.layouts.detect import named_modules

__all__ = ["ALL_LINEAR", "select_matrices"]

ALL_LINEAR = "all-linear"


def select_matrices(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    optimizer_name: str,
    stacks: Collection[str] = (),
) -> list[str]:
    """Names of the weights of the linear layers that ``target_modules`` selects, in model order; then of the stacks.

    Args:
        model: The model; wrappers are seen through.
        target_modules: ``"all-linear"``, or one or more patterns. A module is selected when a pattern occurs in its
            dotted name, or matches all of it as a regular expression; a stack, when one does so with its name.
        stacks: Names of parameters that hold a stack of matrices each.
        optimizer_name: For the error messages.

    Raises:
        TargetModulesError: It is missing, of another type, not a regular expression, or selects nothing.
    """
    linear = [name for name, module in named_modules(model) if isinstance(module, nn.Linear)]
    names = [*linear, *sorted(stacks)]
    if target_modules is None:
        raise TargetModulesError(
            f"{optimizer_name} needs target_modules: which linear layers to train in a low-rank space. "
            f'Pass "all-linear", or parts of module names. {_available(names)}'
        )
    given = [target_modules] if isinstance(target_modules, str) else target_modules
    patterns = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TargetModulesError(
            f"target_modules={target_modules!r} is not a string or a list of non-empty strings. "
            f'Pass "all-linear", or parts of module names. {_available(names)}'
        )
    if [pattern.replace("_", "-") for pattern in patterns] == [ALL_LINEAR]:
        selected = names
    else:
        selected = [name for name in names if any(_matches(pattern, name) for pattern in patterns)]
    if not selected:
        raise TargetModulesError(
            f"target_modules={target_modules!r} selects no linear layer, so {optimizer_name} would train none in a "
            f"low-rank space. {_available(names)}"
        )
    return [name if name in stacks else f"{name}.weight" if name else "weight" for name in selected]


def _matches(pattern: str, name: str) -> bool:
    if pattern in name:
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetModulesError(
            f"target_modules: {pattern!r} is part of no module name and is not a regular expression ({error})."
        ) from error


def _available(linear: Sequence[str]) -> str:
    if not linear:
        return "The model has no torch.nn.Linear layer at all."
    # "model.layers.0.mlp.up_proj" and "model.layers.1.mlp.up_proj" are one thing to choose.
    shapes = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name) for name in linear})
    listing = ", ".join(shapes[:20]) + (", ..." if len(shapes) > 20 else "")
    return f"Linear layers of this model (N for a number): {listing}."
