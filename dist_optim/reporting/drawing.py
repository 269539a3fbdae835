"""A chart becomes SVG: no script, no font and no colour of its own; the page's style sheet colours it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from dist_optim.reporting.axis import Axis, Unit, axis_of, written
from dist_optim.reporting.charts import Chart, Curve

__all__ = ["BOX", "NUM_COLOURS", "figure", "steps_of"]

WIDTH, HEIGHT = 400, 230
BOX = (64.0, 8.0, 388.0, 196.0)
"""Left, top, right and bottom of where curves are, in the units of the picture."""
NUM_COLOURS = 8
MOST_POINTS = 600
"""Of a curve; of more, the lowest and the highest of each part are drawn."""
MOST_DOTS = 80
"""A curve of no more points shows each of them, with its value as a tip."""
MARKS = {
    "raised": "m0-6 5 9h-10z",
    "lowered": "m0 6 5-9h-10z",
    "reset": "m-4-4h8v8h-8z",
    "changed": "m0-6 6 6-6 6-6-6z",
    "skipped": "m-5-4 1-1 4 4 4-4 1 1-4 4 4 4-1 1-4-4-4 4-1-1 4-4z",
}
"""Outlines, by decision; one that kept the rate has none."""

Points = Sequence[tuple[float, float | None]]


def steps_of(charts: Sequence[Chart]) -> Axis:
    """From the first to the last step of all charts, so that they can be compared."""
    steps = (step for chart in charts for curve in chart.curves for step, _ in curve.points)
    return axis_of(steps, is_whole=True)


def figure(chart: Chart, across: Axis) -> str:
    """The chart with its title above it, and below it what its curves are and end with."""
    up = _upwards(chart)
    drawn = "".join(_drawn(at, curve, chart, across, up) for at, curve in enumerate(chart.curves))
    scale = " <small>log scale</small>" if up.is_log else ""
    return (
        f'<figure><h3>{escape(chart.title)}{scale}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(_in_words(chart), quote=True)}" data-steps="{across.low!r} {across.high!r}" '
        f'data-values="{up.low!r} {up.high!r}" data-log="{int(up.is_log)}">'
        f"{_grid(across, up, chart.unit)}{drawn}</svg>{_legend(chart)}</figure>\n"
    )


def _upwards(chart: Chart) -> Axis:
    if chart.unit is Unit.SHARE:
        return Axis(0.0, 1.0)
    values = [value for curve in chart.curves for _, value in curve.points if value is not None]
    return axis_of(values, may_be_log=True, base=1024.0 if chart.unit is Unit.BYTES else 10.0)


# Curves ----------------------------------------------------------------------------------------------------------


def _drawn(at: int, curve: Curve, chart: Chart, across: Axis, up: Axis) -> str:
    points = _thinned(curve.points)
    parts = [_line(piece, across, up) for piece in _pieces(points)]
    for step, value in points:
        if value is None:
            parts.append(_mark(MARKS["skipped"], *_place(step, up.high, across, up), f"step {step:g}: not finite"))
        elif len(points) <= MOST_DOTS:
            x, y = _place(step, value, across, up)
            tip = f"step {step:g}: {written(value, chart.unit)}"
            parts.append(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2"><title>{escape(tip)}</title></circle>')
    for made in curve.decisions:
        if made.what in MARKS:
            tip = f"step {made.step:g}: {made.what} from {made.old_lr:.3g} to {made.new_lr:.3g}"
            parts.append(_mark(MARKS[made.what], *_place(made.step, made.old_lr, across, up), tip))
    return f'<g class="{_classes(at)}">{"".join(parts)}</g>'


def _classes(at: int) -> str:
    """The colour of a curve by its number; after the last colour they come again, dashed."""
    return f"c{at % NUM_COLOURS}" + (" again" if at >= NUM_COLOURS else "")


def _line(piece: Points, across: Axis, up: Axis) -> str:
    placed = (_place(step, value, across, up) for step, value in piece if value is not None)
    return f'<polyline points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in placed)}"/>'


def _pieces(points: Points) -> Iterator[Points]:
    """The curve between values that were not finite."""
    piece: list[tuple[float, float | None]] = []
    for point in (*points, (0.0, None)):
        if point[1] is not None:
            piece.append(point)
        elif piece:
            yield piece
            piece = []


def _thinned(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    size = 2 * len(points) / MOST_POINTS
    parts = [points[int(at * size) : int((at + 1) * size)] for at in range(MOST_POINTS // 2)]
    kept = [points[0]]
    for part in parts:
        finite = [point for point in part if point[1] is not None]
        ends = {
            id(point): point for key in (min, max) if finite for point in [key(finite, key=lambda one: one[1] or 0.0)]
        }
        bad = [point for point in part if point[1] is None][:1]
        kept += sorted([*ends.values(), *bad], key=lambda point: point[0])
    return [*kept, points[-1]]


def _place(step: float, value: float, across: Axis, up: Axis) -> tuple[float, float]:
    left, top, right, bottom = BOX
    return left + (right - left) * across.at(step), bottom - (bottom - top) * up.at(value)


def _mark(outline: str, x: float, y: float, tip: str) -> str:
    return f'<path transform="translate({x:.2f} {y:.2f})" d="{outline}"><title>{escape(tip)}</title></path>'


# Around them -----------------------------------------------------------------------------------------------------


def _grid(across: Axis, up: Axis, unit: Unit) -> str:
    left, top, right, bottom = BOX
    parts = []
    for value in up.lines():
        y = bottom - (bottom - top) * up.at(value)
        parts.append(f'<line x1="{left}" y1="{y:.2f}" x2="{right}" y2="{y:.2f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.2f}" class="end">{escape(written(value, unit))}</text>')
    for step in across.lines():
        if step == int(step):
            x = left + (right - left) * across.at(step)
            parts.append(f'<text x="{x:.2f}" y="{bottom + 15}" class="mid">{written(step)}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{HEIGHT - 4}" class="mid">step</text>')
    return f'<g class="grid"><line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>{"".join(parts)}</g>'


def _legend(chart: Chart) -> str:
    rows = []
    for at, curve in enumerate(chart.curves):
        finite = [value for _, value in curve.points if value is not None]
        last = f"last {written(finite[-1], chart.unit)}" if finite else "none"
        lost = len(curve.points) - len(finite)
        last += f", {lost} not finite" if lost else ""
        swatch = f'<svg viewBox="0 0 20 8" class="{_classes(at)}" aria-hidden="true"><path d="M0 4h20"/></svg>'
        rows.append(f"<li>{swatch}<b>{escape(curve.label)}</b> <span>{escape(last)}</span></li>")
    kinds = dict.fromkeys(made.what for curve in chart.curves for made in curve.decisions if made.what in MARKS)
    shapes = "".join(
        f'<li><svg viewBox="-7 -7 14 14" class="key"><path d="{MARKS[one]}"/></svg>{one}</li>' for one in kinds
    )
    return f"<figcaption><ul>{''.join(rows)}{shapes}</ul></figcaption>"


def _in_words(chart: Chart) -> str:
    """For who hears the page."""
    said = []
    for curve in chart.curves:
        finite = [value for _, value in curve.points if value is not None]
        if finite:
            ends = f"{written(finite[0], chart.unit)} to {written(finite[-1], chart.unit)}"
            said.append(f"{curve.label}: {len(curve.points)} points, from {ends}")
    return f"{chart.title}. {'; '.join(said)}"
