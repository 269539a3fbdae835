"""Bars as SVG, written by hand: the same results give the same bytes, with nothing to install."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["bars"]

COLORS, LAST = ("#9aa5b1", "#c8a26b", "#7fa9cf", "#8a5fa8"), "#2f7d4f"
LEFT, WIDTH, BAR, GAP, TOP = 170, 430, 11, 9, 48


def bars(title: str, values: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Grouped horizontal bars, and a line at 1. The last series stands out.

    Args:
        title: Stands above.
        values: Group (a row of bars) to series to value. Series that a group lacks leave no bar.
        unit: Of the values, behind each.
    """
    series = list(dict.fromkeys(name for group in values.values() for name in group))
    color = {name: LAST if at == len(series) - 1 else COLORS[at % len(COLORS)] for at, name in enumerate(series)}
    largest = max((value for group in values.values() for value in group.values()), default=1.0)
    body, y = [], TOP
    for name, group in values.items():
        body.append(text(LEFT - 8, y + BAR * len(group) / 2 + 4, name, anchor="end"))
        for one, value in group.items():
            length = round(WIDTH * value / largest, 1)
            body.append(f'<rect x="{LEFT}" y="{y}" width="{length}" height="{BAR - 1}" fill="{color[one]}"/>')
            body.append(text(LEFT + length + 5, y + BAR - 2, f"{value:.2f} {unit}", size=10))
            y += BAR
        y += GAP
    unity = round(LEFT + WIDTH / largest, 1)
    body.append(f'<line x1="{unity}" y1="{TOP - 4}" x2="{unity}" y2="{y - GAP}" stroke="#444" stroke-dasharray="3 3"/>')
    legend, x = [], LEFT
    for one in series:
        legend.append(f'<rect x="{x}" y="28" width="10" height="10" fill="{color[one]}"/>')
        legend.append(text(x + 14, 37, one, size=11))
        x += 28 + 7 * len(one)
    width = max(LEFT + WIDTH + 70, x)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif">',
        f'<rect width="{width}" height="{y}" fill="white"/>',
        text(8, 18, title, size=13),
    ]
    return "\n".join([*head, *legend, *body, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
