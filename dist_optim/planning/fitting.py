"""``fit``: of all names and strategies, those that a model has room for on these GPUs, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_optim.errors import DistOptimError, UsageError
from dist_optim.planning.forecast import Forecast, plan
from dist_optim.planning.model import PlannedModel, read_model
from dist_optim.planning.placement import OFFLOADED
from dist_optim.specs.registry import names

__all__ = ["ORDERS", "Fits", "compare", "fit"]

ORDERS = {
    "time": "by the estimated time of a step",
    "headroom": "by what is left of the GPU's memory",
}


@dataclass(frozen=True, slots=True)
class Fits:
    """What was planned: each pair of a name and a strategy is in one of the three."""

    fitting: tuple[Forecast, ...]
    """The best first."""
    too_large: tuple[Forecast, ...]
    """The one that lacks least first."""
    refused: dict[str, str]
    """Why, by name and strategy."""


def compare(
    model: str | Path | nn.Module | PlannedModel,
    optimizers: Iterable[str],
    strategies: Iterable[str],
    num_ranks: int,
    *,
    before_each: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[list[Forecast], dict[str, str]]:
    """A plan of each pair, and the refusals.

    Args:
        model, num_ranks, **options: As ``plan`` takes them. Hyperparameters are for the names that have them.
        optimizers: Names.
        strategies: As ``plan`` takes them.
        before_each: Called with what is planned next.

    Raises:
        UsageError: The model or a number cannot be used.
    """
    read = read_model(model)
    found: list[Forecast] = []
    refused: dict[str, str] = {}
    for optimizer in optimizers:
        for strategy in strategies:
            pair = f"{optimizer}, {strategy}"
            if before_each is not None:
                before_each(pair)
            try:
                found.append(plan(read, optimizer, strategy, num_ranks, **options))
            except UsageError:
                raise
            except DistOptimError as error:
                refused[pair] = str(error)
    return found, refused


def fit(
    model: str | Path | nn.Module | PlannedModel,
    num_ranks: int,
    *,
    optimizers: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
    order: str = "time",
    before_each: Callable[[str], None] | None = None,
    **options: Any,
) -> Fits:
    """Which optimizers and strategies fit.

    Args:
        model, num_ranks, **options: As ``plan`` takes them.
        optimizers: Names; None: all that are installed.
        strategies: None: those that make sense on so many ranks and nodes; for names that fit under none, the offloaded
            ones too.
        order: A key of ``ORDERS``.
        before_each: Called with what is planned next.

    Raises:
        UsageError: The model, a strategy, a number or the order cannot be used.
    """
    if order not in ORDERS:
        raise UsageError(f"order {order!r} is unknown. Orders: {', '.join(ORDERS)}.")
    wanted = strategies or sensible(num_ranks, options.get("num_nodes"))
    read = read_model(model)
    found, refused = compare(read, optimizers or names(), wanted, num_ranks, before_each=before_each, **options)
    if strategies is None and num_ranks > 1:
        served = {one.optimizer for one in found if one.fits}
        rest = dict.fromkeys(one.optimizer for one in found if one.optimizer not in served)
        more = compare(read, rest, OFFLOADED, num_ranks, before_each=before_each, **options)
        found, refused = found + more[0], refused | more[1]

    def rank(one: Forecast) -> tuple[float, float]:
        seconds = one.optimizer_s if one.step_s is None else one.step_s
        return (seconds, -one.headroom) if order == "time" else (-one.headroom, seconds)

    fitting = sorted((one for one in found if one.fits), key=rank)
    return Fits(
        tuple(fitting),
        tuple(sorted((one for one in found if not one.fits), key=lambda one: -one.headroom)),
        refused,
    )


def sensible(num_ranks: int, num_nodes: int | None) -> list[str]:
    """Strategies to try: HSDP where there are several nodes to replicate over."""
    if num_ranks == 1:
        return ["one"]
    nodes = num_nodes or max(1, -(-num_ranks // 8))
    hybrid = ["hsdp"] if nodes > 1 and num_ranks % nodes == 0 else []
    return ["ddp", "fsdp2", *hybrid, "zero1", "zero2", "zero3"]
