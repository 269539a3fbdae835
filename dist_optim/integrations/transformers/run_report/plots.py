"""The two pictures of a run. Needs matplotlib, which is imported on use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["plot_losses", "plot_rates"]

MARKERS = {"raised": "^", "lowered": "v", "reset": "s", "changed": "D", "skipped": "x"}


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Both losses over the steps."""
    with _plot("nats per token", path, title) as axes:
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([step for step, _ in points], [value for _, value in points], style, label=key)


def plot_rates(rows: list[dict[str, Any]], log: Path, path: Path, title: str) -> None:
    """The learning rate over the steps, and a mark at each decision that the log holds."""
    decisions = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    points = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    for made in decisions:  # the step before the decision used the old rate, the step after it uses the new one
        points += [(made["step"], made["old_lr"][0]), (made["step"] + 1, made["new_lr"][0])]
    points.sort(key=lambda point: point[0])
    with _plot("learning rate", path, title) as axes:
        axes.plot([at for at, _ in points], [rate for _, rate in points], "-", label="learning rate")
        for decision, marker in MARKERS.items():
            marked = [(made["step"], made["old_lr"][0]) for made in decisions if made["decision"] == decision]
            if marked:
                axes.plot([step for step, _ in marked], [rate for _, rate in marked], marker, label=decision)


@contextmanager
def _plot(what: str, path: Path, title: str) -> Iterator[Any]:
    """Axes to draw ``what`` over the steps on; the figure is written when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))  # not pyplot, whose backend is the caller's to choose
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    axes.set(xlabel="step", ylabel=what, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
