"""The page, whole: one HTML text without scripts, fonts or anything else from outside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dist_optim.reporting.charts import charts_of
from dist_optim.reporting.drawing import figure, steps_of
from dist_optim.reporting.reading import Run
from dist_optim.reporting.style import STYLE
from dist_optim.reporting.tables import changed_settings, differences, figures, settings, table, versions

__all__ = ["GENERATOR", "page"]

GENERATOR = '<meta name=generator content="dist-optim report">'
"""By which a page is known as one of ours."""


def page(runs: Sequence[Run]) -> str:
    """What these runs have left, side by side."""
    names = ", ".join(run.name for run in runs)
    title = f"{len(runs)} runs: {names}" if len(runs) > 1 else names
    parts = [_figures(runs), _differences(runs), _charts(runs), _audits(runs), _settings(runs), _left_out(runs)]
    return (
        f"<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8>{GENERATOR}\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(parts)}"
        "<footer>Written by dist-optim report.</footer>\n</main></body></html>\n"
    )


def _section(title: str, content: str, words: str = "") -> str:
    said = f"<p>{escape(words)}</p>" if words else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>\n" if content else ""


def _figures(runs: Sequence[Run]) -> str:
    lines = figures(runs)
    return _section("Figures", table(runs, lines) if lines else "")


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    lines = differences(runs)
    known = sum(bool(run.about) for run in runs)
    words = "" if lines else "Nothing that is known of these runs differs."
    if known < len(runs):
        words = f"{words} The settings of {known} of the {len(runs)} runs are known.".strip()
    return _section("What differs", table(runs, lines) if lines else "<p></p>", words)


def _charts(runs: Sequence[Run]) -> str:
    charts = charts_of(runs)
    across = steps_of(charts)
    drawn = "".join(figure(chart, across) for chart in charts)
    return _section("Over the steps", f'<div class="charts">{drawn}</div>' if drawn else "")


def _audits(runs: Sequence[Run]) -> str:
    """Which algorithm got which tensors."""
    found = [(run.name, run.about["audit"]) for run in runs if isinstance(run.about.get("audit"), str)]
    name_of = (lambda name: f"<h3>{escape(name)}</h3>") if len(runs) > 1 else (lambda name: "")
    return _section(
        "Audit", "".join(f"{name_of(name)}<pre tabindex=0>{escape(text)}</pre>" for name, text in found if text)
    )


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    for title, lines, is_open in (
        ("Other than by default", changed_settings(runs), True),
        ("Versions", versions(runs), True),
        ("All settings", settings(runs), False),
    ):
        if lines:
            shown = " open" if is_open else ""
            parts.append(f"<details{shown}><summary>{title} ({len(lines)})</summary>{table(runs, lines)}</details>")
    return _section("Settings and versions", "".join(parts))


def _left_out(runs: Sequence[Run]) -> str:
    said = [(run.name, text) for run in runs for text in run.left_out]
    items = "".join(f"<li><b>{escape(name)}</b> {escape(text)}</li>" for name, text in said)
    return _section("What is not here", f"<ul>{items}</ul>" if items else "")
