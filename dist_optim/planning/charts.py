"""A bar a plan, stacked by what takes the memory, and a line where the GPU ends. matplotlib is imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_optim.errors import MissingPackageError, UsageError
from dist_optim.planning.forecast import Forecast

__all__ = ["PARTS", "draw"]

PARTS = ("weights", "gradients", "masters", "optimizer state", "rest of the peak")
COLORS = ("#7a8793", "#c8a26b", "#8a5fa8", "#2f7d4f", "#c9d3db")
SUFFIXES = (".png", ".svg")


def draw(found: Sequence[Forecast], labels: Sequence[str], path: Path, title: str) -> None:
    """Write a chart of the fullest rank's peak.

    Args:
        found: The plans, from the top down.
        labels: Of each.
        path: A .png or .svg file.
        title: Stands above.

    Raises:
        UsageError: The file is of another kind, or cannot be written.
        MissingPackageError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--chart {str(path)!r}: give a file that ends in {' or '.join(SUFFIXES)}.")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"a chart needs matplotlib, which cannot be imported ({error}). pip install 'dist-optim[train]'"
        ) from error
    figure = Figure(figsize=(9, 1.4 + 0.28 * len(found)))  # not pyplot, whose backend is the caller's to choose
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _bars(axes, found, labels)
    axes.set(xlabel="GiB on the fullest rank", title=title)
    with matplotlib.rc_context({"svg.hashsalt": "dist_optim"}):
        try:
            metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=120, bbox_inches="tight", metadata=metadata)
        except OSError as error:
            raise UsageError(f"--chart {str(path)!r} cannot be written: {error}.") from error


def parts_of(one: Forecast) -> list[float]:
    """GiB of each of ``PARTS``: together the peak."""
    kept = [one.memory[part].max / (1 << 30) for part in PARTS[:-1]]
    return [*kept, max(0.0, one.peak.max / (1 << 30) - sum(kept))]


def _bars(axes: Any, found: Sequence[Forecast], labels: Sequence[str]) -> None:
    lefts = [0.0] * len(found)
    rows = list(range(len(found)))
    for at, (part, color) in enumerate(zip(PARTS, COLORS, strict=True)):
        widths = [parts_of(one)[at] for one in found]
        axes.barh(rows, widths, left=lefts, color=color, label=part, height=0.7)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    if found:
        axes.axvline(found[0].gpu_bytes / (1 << 30), color="#b03030", linestyle="--", label="what the GPU has for it")
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
