"""Which charts there are: of one run a curve for each figure of a kind; of several a chart for each, a curve a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_optim.reporting.axis import Unit
from dist_optim.reporting.files import TELEMETRY
from dist_optim.reporting.reading import Decision, Run

__all__ = ["Chart", "Curve", "charts_of"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over steps; None where one was not finite."""

    label: str
    points: tuple[tuple[float, float | None], ...]
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    unit: Unit
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """Figures that belong together; ``keys`` are regular expressions with what each is called on the chart."""

    title: str
    unit: Unit
    keys: tuple[tuple[str, str], ...]


def _telemetry(title: str, unit: Unit, *keys: tuple[str, str]) -> Kind:
    return Kind(title, unit, tuple((TELEMETRY + key, label) for key, label in keys))


KINDS = (
    Kind("Loss", Unit.NUMBER, (("loss", "training"), ("eval_loss", "evaluation"))),
    Kind("Learning rate", Unit.NUMBER, (("learning_rate", "learning rate"),)),
    Kind("Gradient norm", Unit.NUMBER, (("grad_norm", "before clipping"),)),
    _telemetry("Update over weight", Unit.NUMBER, (r"update_ratio_group_(\d+)", r"group \1")),
    _telemetry(
        "Time in the optimizer's step, rank 0",
        Unit.SECONDS,
        ("step_seconds", "whole step"),
        ("upstream_seconds", "upstream's own code"),
        ("gather_seconds", "gather to owners"),
        ("scatter_seconds", "scatter from owners"),
    ),
    _telemetry("Bytes exchanged in a step, all ranks", Unit.BYTES, ("exchanged_bytes", "bytes")),
    _telemetry("Projections renewed", Unit.NUMBER, ("projections_renewed", "since the line before")),
    _telemetry("Time of steps that renew projections", Unit.SECONDS, ("refresh_seconds", "mean, rank 0")),
    _telemetry("Clip rate", Unit.SHARE, ("clip_rate", "steps over the bound")),
    _telemetry("Optimizer state, rank 0", Unit.BYTES, ("state_bytes", "bytes")),
    Kind("Speed, all ranks", Unit.NUMBER, (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s"))),
)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts for which any of these runs has figures, in the order of ``KINDS``."""
    return [chart for kind in KINDS for chart in _charts(kind, runs)]


def _charts(kind: Kind, runs: Sequence[Run]) -> Iterator[Chart]:
    found = _found(kind, runs)
    if len(runs) == 1:
        curves = tuple(_curve(runs[0], key, label) for key, label in found)
        if curves:
            yield Chart(kind.title, kind.unit, curves)
        return
    for key, label in found:
        title = kind.title if len(kind.keys) == len(found) == 1 else f"{kind.title}: {label}"
        yield Chart(title, kind.unit, tuple(_curve(run, key, run.name) for run in runs))


def _found(kind: Kind, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Names of figures and what they are called, in the order of the kind and then of their numbers."""
    there = {key for run in runs for row in run.rows for key in row}
    found = []
    for pattern, label in kind.keys:
        matches = [match for key in there if (match := re.fullmatch(pattern, key, re.ASCII)) is not None]
        matches.sort(key=lambda match: (len(match.string), match.string))
        found += [(match.string, match.expand(label)) for match in matches]
    return found


def _curve(run: Run, key: str, label: str) -> Curve:
    points = [(row["step"] or 0.0, row[key]) for row in run.rows if key in row]
    if key != "learning_rate":
        return Curve(label, tuple(points))
    for made in run.decisions:  # the step before the decision used the old rate, the step after it uses the new one
        points += [(made.step, made.old_lr), (made.step + 1, made.new_lr)]
    points.sort(key=lambda point: point[0])
    return Curve(label, tuple(points), tuple(run.decisions))
