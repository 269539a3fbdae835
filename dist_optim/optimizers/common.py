"""Hyperparameters that many families share, under the names and with the ranges that upstream gives them."""

from __future__ import annotations

from dist_optim.hyperparameters import Hyperparameter, Scope

__all__ = ["betas", "epsilon", "flag", "learning_rate", "weight_decay"]


def learning_rate(default: float | None = 1e-3) -> Hyperparameter:
    """``lr``; required where there is no default."""
    return Hyperparameter(
        name="lr", kind="float", default=default, minimum=0.0, required=default is None, meaning="learning rate"
    )


def betas(first: float = 0.9, second: float = 0.999) -> Hyperparameter:
    """``betas`` of Adam-like methods."""
    return Hyperparameter(
        name="betas",
        kind="floats",
        default=(first, second),
        minimum=0.0,
        maximum=1.0,
        maximum_open=True,
        meaning="decay rates of the running averages of the gradient and of its square",
    )


def epsilon(default: float = 1e-8) -> Hyperparameter:
    """``eps`` in the denominator."""
    return Hyperparameter(
        name="eps",
        kind="float",
        default=default,
        minimum=0.0,
        meaning="added to the denominator against division by zero",
    )


def weight_decay(default: float = 0.0, meaning: str = "decoupled weight decay") -> Hyperparameter:
    """``weight_decay``."""
    return Hyperparameter(name="weight_decay", kind="float", default=default, minimum=0.0, meaning=meaning)


def flag(name: str, default: bool, meaning: str, scope: Scope = Scope.GROUP, optional: bool = False) -> Hyperparameter:
    """A switch."""
    return Hyperparameter(name=name, kind="bool", default=default, meaning=meaning, scope=scope, optional=optional)
