"""Hyperparameters that many families share, under the names and with the ranges that upstream gives them."""

from __future__ import annotations

from dist_optim.specs.hyperparameters import Hyperparameter, Scope

__all__ = [
    "CLIP_GRAD_NORM",
    "adafactor_hyperparameters",
    "betas",
    "epsilon",
    "factored_moment",
    "flag",
    "learning_rate",
    "limit",
    "weight_decay",
]


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


def factored_moment(scope: Scope = Scope.GROUP) -> tuple[Hyperparameter, ...]:
    """``eps``, ``clip_threshold`` and ``decay_rate`` of methods with Adafactor's second moment."""
    return (
        Hyperparameter(
            name="eps",
            kind="floats",
            default=(1e-30, 1e-3),
            minimum=0.0,
            scope=scope,
            meaning="added to the squared gradient; least scale of a parameter, where updates are scaled by it",
        ),
        Hyperparameter(
            name="clip_threshold",
            kind="float",
            default=1.0,
            minimum=0.0,
            minimum_open=True,
            scope=scope,
            meaning="largest root mean square of a tensor's update before the learning rate",
        ),
        Hyperparameter(
            name="decay_rate",
            kind="float",
            default=-0.8,
            maximum=0.0,
            scope=scope,
            meaning="the second moment decays by 1 - t ** decay_rate at step t",
        ),
    )


def adafactor_hyperparameters(default_rate: float | None) -> tuple[Hyperparameter, ...]:
    """All of Adafactor's, with the Trainer's defaults: a given rate, and neither scaling nor relative steps."""
    return (
        Hyperparameter(
            name="lr",
            kind="float",
            default=default_rate,
            minimum=0.0,
            optional=True,
            meaning="learning rate; None with relative_step=True",
        ),
        *factored_moment(),
        Hyperparameter(
            name="beta1",
            kind="float",
            default=None,
            minimum=0.0,
            maximum=1.0,
            maximum_open=True,
            optional=True,
            meaning="decay rate of a running average of the update; None keeps none",
        ),
        weight_decay(0.0),
        flag("scale_parameter", False, "scale the rate of a tensor by its root mean square"),
        flag("relative_step", False, "compute the rate from the number of steps, in place of lr"),
        flag("warmup_init", False, "let relative steps grow from 1e-6"),
    )


def limit(name: str, meaning: str) -> Hyperparameter:
    """A bound that there need not be, of gradients say; the constructor alone takes it."""
    return Hyperparameter(
        name=name,
        kind="float",
        default=None,
        minimum=0.0,
        minimum_open=True,
        optional=True,
        scope=Scope.CONSTRUCTOR,
        meaning=meaning,
    )


CLIP_GRAD_NORM = limit(
    "clip_grad_norm", "largest norm of all gradients together; inside backward it costs a second backward pass"
)
