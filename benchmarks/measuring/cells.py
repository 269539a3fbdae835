"""One cell: an optimizer under a layout on so many ranks, measured beside the alternatives. The body of a rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_optim.integrations.quiet import quieten_libraries
from dist_optim.ranks.agreement import gather_objects, own_rank
from measuring.apart import apart
from measuring.contenders import ALONE, Build, Contender, Problem, alone, contenders_of
from measuring.counting import Counts, counts_of
from measuring.models import MODELS
from measuring.recipes import RECIPES, Recipe
from measuring.through_backward import through_backward
from measuring.timing import Sample, in_turn

__all__ = ["Cell", "measure"]

WARM_UP = 1
FEWEST, MOST = 6, 40
"""Steps of each contender."""
REFRESHES = 5
"""Of each contender, where some steps refresh a projection: a median of one would be noise."""
LEAST_S = 1e-5
"""What is left of a step when noise has taken the rest."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured, and how long."""

    optimizer: str
    layout: str
    ranks: int
    model: str = "matrices"
    seconds: float = 4.0
    device: str = "cpu"
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_through_backward: bool = False
    """Gradients come from the engine, and what its backward costs more counts."""
    is_apart: bool = False
    """What a step consists of, in place of what one would use instead."""

    def __str__(self) -> str:
        kind = ", through backward" * self.is_through_backward + ", apart" * self.is_apart
        return f"{self.optimizer}, {self.layout}, {self.ranks} ranks, {self.model}{kind}"


def measure(cell: Cell) -> dict[str, Row]:
    """By contender: times, counts and the distance of its weights from one process; or why it could not step.

    Collective; the same on all ranks but for distances, which rank 0 knows.
    """
    device = torch.device(cell.device, torch.cuda.current_device()) if cell.device == "cuda" else torch.device("cpu")
    quieten_libraries()
    problem = Problem.of(RECIPES[cell.optimizer], MODELS[cell.model], device)
    ready, rows = made(builders(problem, cell))
    at_least = max(FEWEST, REFRESHES * problem.recipe.refresh_every)
    samples = in_turn(ready, device, at_least=at_least, at_most=MOST, seconds=cell.seconds)
    reference = ready[0].weights()
    for one in ready:
        own = without(samples[one.name], samples.get(one.beside))
        rows[one.name] = times(own, samples[ALONE], problem.recipe)
        rows[one.name]["distance"] = distance(one.weights(), reference)
    for one in ready:  # counted in steps of their own, after all weights are compared
        rows[one.name] |= busiest(gather_objects(counts_of(one.prepare, one.step)))
    return rows


def made(build: dict[str, Build]) -> tuple[list[Contender], dict[str, Row]]:
    """The contenders that can step, and rows of those that cannot."""
    ready: list[Contender] = []
    rows: dict[str, Row] = {}
    for name, one in build.items():
        contender, reason = tried(one)
        if contender is None:
            rows[name] = {"refused": reason}
        else:
            ready.append(contender)
            rows[name] = {}
    return ready, rows


def builders(problem: Problem, cell: Cell) -> dict[str, Build]:
    """How to build each contender, one process first."""
    if cell.is_through_backward:
        return through_backward(problem, cell.layout, cell.variants)
    if cell.is_apart:
        return apart(problem, cell.layout)
    if not cell.layout.startswith("zero"):
        return contenders_of(problem, cell.layout, cell.variants)
    from measuring.zero import under_zero

    return {ALONE: lambda: alone(problem), **under_zero(problem, int(cell.layout.removeprefix("zero")))}


def tried(build: Callable[[], Contender]) -> tuple[Contender | None, str]:
    """Build it and take the first step; None where that failed on any rank, and the first line of its error."""
    contender, reason = None, ""
    try:
        contender = build()
        contender.prepare()
        contender.step()
    except Exception as error:  # whatever an alternative cannot do is a result
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    reason = next(filter(None, gather_objects(reason)), "")
    return (None, reason) if reason else (contender, "")


def without(samples: Sequence[Sample], engine: Sequence[Sample] | None) -> Sequence[Sample]:
    """Less what the engine alone takes beside each."""
    if engine is None:
        return samples
    return [
        Sample(max(one.wall_s - other.wall_s, LEAST_S), max(one.processor_s - other.processor_s, LEAST_S))
        for one, other in zip(samples, engine, strict=True)
    ]


def times(samples: Sequence[Sample], alone: Sequence[Sample], recipe: Recipe) -> Row:
    """Medians in milliseconds, and how many times as fast as one process beside it."""
    # The first step, a refresh, was taken when the contender was tried.
    numbers = range(1, len(samples) + 1)
    is_refresh = [bool(recipe.refresh_every) and number % recipe.refresh_every == 0 for number in numbers]
    row: Row = {"steady": medians([at for at in range(WARM_UP, len(samples)) if not is_refresh[at]], samples, alone)}
    if any(is_refresh):
        row["refresh"] = medians([at for at, is_one in enumerate(is_refresh) if is_one], samples, alone)
    return row


def medians(chosen: Sequence[int], samples: Sequence[Sample], alone: Sequence[Sample]) -> dict[str, float]:
    def median(values: Sequence[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    return {
        "wall_ms": median([1e3 * samples[at].wall_s for at in chosen], 2),
        "processor_ms": median([1e3 * samples[at].processor_s for at in chosen], 2),
        "wall_speed": median([alone[at].wall_s / samples[at].wall_s for at in chosen], 3),
        "processor_speed": median([alone[at].processor_s / samples[at].processor_s for at in chosen], 3),
    }


def distance(weights: Sequence[Tensor], reference: Sequence[Tensor]) -> float | None:
    """The largest difference of any weight, on rank 0; None where there is nothing to compare."""
    if own_rank() or not weights:
        return None
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in zip(weights, reference, strict=True))


def busiest(everyones: Sequence[Counts]) -> Row:
    """The largest of each count, over ranks."""
    rows = [asdict(one) for one in everyones]
    return {key: max((row[key] for row in rows), key=size) for key in rows[0]}


def size(value: int | dict[str, int]) -> int:
    return sum(value.values()) if isinstance(value, dict) else value
