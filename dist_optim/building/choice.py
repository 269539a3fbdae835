"""From what the user chose, a name or a class, to the spec that describes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_optim.errors import ParameterError, UnsupportedError
from dist_optim.specs.composed import ComposedSpec
from dist_optim.specs.registry import OptimizerSpec, get_spec, names, spec_of_class, spec_of_factory
from dist_optim.specs.unwrapping import find_optimizer
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["refuse_combination", "refuse_inside_backward", "resolve"]

_TOO_LATE = (
    "{name}: on_nonfinite looks at all gradients before the first update, and inside backward updates are made before "
    "the last gradients are there. Leave on_nonfinite out, or use {instead}, which stores gradients."
)
_NO_MASTERS = (
    "{name}: master_weights are stepped from stored gradients, and inside backward a parameter is stepped as it is. "
    "Leave master_weights out, or use {instead}."
)
_NO_SHADOW = (
    "{name}: verify_steps takes a step again from all its gradients, and inside backward they are freed one by one. "
    "Use {instead}; or verify before the run: dist-optim verify."
)


def resolve(
    optimizer: str | type[Optimizer] | Callable[..., Optimizer], *, inside_backward: bool = False
) -> OptimizerSpec:
    """The spec of a name or a class, with its package at hand.

    Args:
        optimizer: What the user chose.
        inside_backward: Whether the caller can step inside backward, as layerwise names always do.

    Raises:
        UnknownOptimizerError, MissingPackageError, UnsupportedError: It cannot be used.
        ParameterError: It is something else; an optimizer that is built already, most often.
    """
    if isinstance(optimizer, str):
        spec = get_spec(optimizer)
    elif isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        spec = spec_of_class(optimizer)
        if spec.is_undescribed:
            _refuse_other_inputs(optimizer)
    elif callable(optimizer) and not isinstance(optimizer, (type, Optimizer)):
        spec = spec_of_factory(optimizer)
    else:
        raise ParameterError(_why_no_choice(optimizer))
    if spec.refusal:
        raise UnsupportedError(f"{spec.name}: {spec.refusal}")
    if spec.instead and not inside_backward:
        raise UnsupportedError(
            f"{spec.name} steps each parameter inside backward, which is not served here. Use {spec.instead}, the same "
            "algorithm with stored gradients."
        )
    return spec


def refuse_combination(spec: OptimizerSpec, *, is_fused: bool) -> None:
    """Refuse what cannot be stepped in the way that was asked for.

    Raises:
        UnsupportedError: With what to choose.
    """
    if is_fused and isinstance(spec, ComposedSpec):
        raise UnsupportedError(
            f"{spec.name}: inside backward one algorithm steps all parameters. Leave fused_backward out, or choose one."
        )
    if is_fused and spec.is_coupled:
        raise UnsupportedError(
            f"{spec.name} needs all gradients before its first update, and inside backward updates are made before the "
            "last gradients are there. Leave fused_backward out, or the bound on the norm of all gradients."
        )


def refuse_inside_backward(
    spec: OptimizerSpec, on_nonfinite: str | None, master_weights: bool, verify_steps: int
) -> None:
    """Refuse options that need all gradients of a step, where they are applied and freed inside backward.

    Raises:
        UnsupportedError: With what to choose; of the first one.
    """
    asked = ((on_nonfinite is not None, _TOO_LATE), (master_weights, _NO_MASTERS), (verify_steps, _NO_SHADOW))
    for is_asked, text in asked:
        if is_asked:
            raise UnsupportedError(text.format(name=spec.name, instead=spec.instead or "fused_backward=False"))


def _refuse_other_inputs(optimizer_class: type[Optimizer]) -> None:
    """A class that is built from a model, or around another optimizer, needs a function that does so."""
    first = next(iter(inspect.signature(optimizer_class).parameters), "")
    name = optimizer_class.__name__
    if first in ("model", "module"):
        raise UnsupportedError(
            f"{name} is built from a {first}, and here upstream gets tensors of its own, which are no {first}'s. Use "
            "it in one process, without dist_optim; or another class of the same algorithm, that takes parameters."
        )
    if first in ("optimizer", "base_optimizer", "inner_optimizer") and not _takes_parameters(optimizer_class):
        raise UnsupportedError(
            f"{name} is built around another optimizer. Pass a function that builds both, in place of the class: "
            f"lambda params: {name}(torch.optim.AdamW(params, lr=1e-3))."
        )


def _takes_parameters(optimizer_class: type[Optimizer]) -> bool:
    """Whether it is content with a list of parameters, whatever its argument is called."""
    build: Any = optimizer_class
    try:
        build([nn.Parameter(torch.zeros(2, 2, device="cpu"))])
    except Exception:
        return False
    return True


def _why_no_choice(given: object) -> str:
    if not isinstance(given, Optimizer):
        return (
            f"optimizer={given!r} is neither a registered name nor a subclass of torch.optim.Optimizer. "
            "Pass one of dist_optim.names(), or the class itself."
        )
    inside = find_optimizer(given, Optimizer) or given
    name = inside.spec.name if isinstance(inside, DistributedOptimizer) else spec_of_class(type(inside)).name
    wanted = repr(name) if name in names() else type(inside).__name__
    return (
        f"optimizer is an instance of {type(inside).__name__}, built already, on parameters that wrapping the model "
        f"may replace. Pass what to build instead, and its hyperparameters: {wanted}, lr=..., ... It is built when the "
        "model is in place."
    )
