"""The page's tables: rows of words, a column for each run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from dist_optim.reporting.axis import Unit, written
from dist_optim.reporting.reading import Run

__all__ = ["changed_settings", "differences", "figures", "settings", "table", "versions"]

PLACES = ("output_dir", "logging_dir", "overwrite_output_dir", "local_rank", "run_name")
"""Settings that say where a run is, not what it is."""
MISSING = "–"

Line = tuple[str, list[str]]


def table(runs: Sequence[Run], lines: Sequence[Line]) -> str:
    """HTML; it scrolls inside its own box where it is wider than the page."""
    head = "".join(f"<th scope=col>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th scope=row>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, cells in lines
    )
    above = f"<thead><tr><td></td>{head}</tr></thead>" if len(runs) > 1 else ""
    return f'<div class="wide" tabindex=0><table>{above}<tbody>{body}</tbody></table></div>'


# Figures ---------------------------------------------------------------------------------------------------------


def figures(runs: Sequence[Run]) -> list[Line]:
    """What each run ended with; lines that no run has are left out."""
    made: tuple[tuple[str, Callable[[Run], str | None]], ...] = (
        ("optimizer", lambda run: _words(run.summary.get("optim") or _settings(run).get("optim"))),
        ("ranks, strategy", _ranks),
        ("steps", lambda run: _figure(run.summary.get("steps") or (run.rows[-1]["step"] if run.rows else None))),
        ("training loss, first → last", lambda run: _first_and_last(run, "loss")),
        ("evaluation loss, first → last", lambda run: _first_and_last(run, "eval_loss")),
        ("lowest evaluation loss", _lowest),
        ("last learning rate", lambda run: _figure(_last(run, "learning_rate"))),
        ("decisions of the schedule", _decisions),
        ("tokens per second, all ranks", lambda run: _figure(run.summary.get("tokens_per_second"))),
        ("samples per second, all ranks", lambda run: _figure(run.summary.get("samples_per_second"))),
        ("time in training steps", lambda run: _figure(run.summary.get("train_seconds"), Unit.SECONDS)),
        ("elements on the named algorithm", lambda run: _figure(_coverage(run), Unit.SHARE)),
        ("optimizer state, fullest rank", lambda run: _most(run, "optimizer_state_bytes_per_rank")),
        ("that of torch's AdamW", lambda run: _most(run, "adamw_state_bytes_per_rank")),
        ("peak memory, fullest rank", lambda run: _most(run, "peak_memory_bytes_per_rank")),
    )
    lines = [(label, [of(run) for run in runs]) for label, of in made]
    return [(label, [cell or MISSING for cell in cells]) for label, cells in lines if any(cells)]


def _figure(value: Any, unit: Unit = Unit.NUMBER) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return written(float(value), unit) if is_number else None


def _words(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _ranks(run: Run) -> str | None:
    found = [_words(run.summary.get(key, run.about.get(key))) for key in ("world_size", "strategy")]
    return ", ".join(one for one in found if one) or None


def _values(run: Run, key: str) -> list[float | None]:
    return [row[key] for row in run.rows if key in row]


def _last(run: Run, key: str) -> float | None:
    return (_values(run, key) or [None])[-1]


def _first_and_last(run: Run, key: str) -> str | None:
    values = _values(run, key)
    ends = ["not finite" if value is None else f"{value:.4f}" for value in (values[:1] + values[-1:])]
    return " → ".join(ends) or None


def _lowest(run: Run) -> str | None:
    found = [(value, row["step"] or 0.0) for row in run.rows if (value := row.get("eval_loss")) is not None]
    return f"{min(found)[0]:.4f} at step {min(found)[1]:g}" if found else None


def _decisions(run: Run) -> str | None:
    counts = run.summary.get("lr_decisions")
    if not isinstance(counts, dict):
        counts = {made.what: 0 for made in run.decisions}
        for made in run.decisions:
            counts[made.what] += 1
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or None


def _coverage(run: Run) -> Any:
    return run.about.get("coverage", _last(run, "optim_coverage"))


def _most(run: Run, key: str) -> str | None:
    by_rank = run.summary.get(key)
    numbers = [one for one in by_rank if isinstance(one, int)] if isinstance(by_rank, list) else []
    return written(float(max(numbers)), Unit.BYTES) if numbers else None


# Settings --------------------------------------------------------------------------------------------------------


def settings(runs: Sequence[Run]) -> list[Line]:
    """Every setting of every run, by name."""
    return _lines([_settings(run) for run in runs])


def changed_settings(runs: Sequence[Run]) -> list[Line]:
    """Those that some run has other than by default."""
    names = {name for run in runs if isinstance(run.about.get("set"), list) for name in map(str, run.about["set"])}
    return [line for line in settings(runs) if line[0] in names]


def versions(runs: Sequence[Run]) -> list[Line]:
    """Packages' versions."""
    return _lines([_object(run.about.get("versions")) for run in runs], is_sorted=False)


def differences(runs: Sequence[Run]) -> list[Line]:
    """What the runs do not have alike: how they were spread, settings but for where they are, versions."""
    spread = [{key: run.summary.get(key, run.about.get(key)) for key in ("strategy", "world_size")} for run in runs]
    found = [*_lines(spread), *settings(runs), *((f"version of {name}", cells) for name, cells in versions(runs))]
    return [(name, cells) for name, cells in found if len(set(cells)) > 1 and name not in PLACES]


def _settings(run: Run) -> dict[str, Any]:
    return _object(run.about.get("settings"))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _lines(by_run: Sequence[Mapping[str, Any]], *, is_sorted: bool = True) -> list[Line]:
    names = dict.fromkeys(name for one in by_run for name in one)
    order = sorted(names) if is_sorted else list(names)
    return [(name, [_cell(one, name) for one in by_run]) for name in order]


def _cell(one: Mapping[str, Any], name: str) -> str:
    return (_words(one[name]) or "none") if name in one else MISSING
