"""A run's folder becomes a ``Run``. What is missing or cannot be read is left out, and said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_optim.errors import UsageError
from dist_optim.reporting.files import ABOUT, DECISIONS, METRICS, SUMMARY, TELEMETRY, UNFINISHED

__all__ = ["Decision", "Row", "Run", "read_runs"]

STATE = "trainer_state.json"
Row = dict[str, float | None]
"""Figures by name; None for one that was not finite."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a schedule decided after an evaluation, of the first param group."""

    step: float
    what: str
    old_lr: float
    new_lr: float


@dataclass(slots=True)
class Run:
    """What is known of one run."""

    path: Path
    name: str = ""
    rows: list[Row] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """What is not on the page, and why; whole sentences."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read these folders, each once, and name them apart.

    Raises:
        UsageError: One of them is not the folder of a run.
    """
    once = list(dict.fromkeys(path.resolve() for path in paths))
    try:
        runs = [_read(path) for path in once]
    except OSError as error:
        raise UsageError(f"A run's folder cannot be read: {error}.") from error
    for run, name in zip(runs, _names(once), strict=True):
        run.name = name
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """As little of the end of each path as tells it from the others."""
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path) -> Run:
    run = Run(path)
    if not path.is_dir():
        said = "is a file. Give the folder that it is in" if path.exists() else "does not exist. Give a run's folder"
        raise UsageError(f"{str(path)!r} {said}: what was the --output_dir of a training run.")
    unfinished = path / UNFINISHED
    if (path / METRICS).is_file() or (path / SUMMARY).is_file():
        _read_files(run, path)
        if unfinished.is_dir():
            run.left_out.append("Another run into this folder has begun and not finished: this is the one before it.")
    elif (unfinished / METRICS).is_file():
        _read_files(run, unfinished)
        run.left_out.append("This run has not finished, or was broken off: figures up to its last line of metrics.")
    elif states := _states_in(path):
        _read_state(run, states[-1])
    else:
        raise UsageError(_why_no_run(path))
    _say_what_is_missing(run)
    return run


def _states_in(path: Path) -> list[Path]:
    """The Trainer's own logs, in the folder itself or its checkpoints; the last one last."""
    found = [path / STATE, *path.glob(f"checkpoint-*/{STATE}")]
    return sorted((one for one in found if one.is_file()), key=lambda one: one.stat().st_mtime)


def _why_no_run(path: Path) -> str:
    inside = sorted(one.name for one in path.iterdir() if one.is_dir() and _is_run(one))
    what = f"{str(path)!r} is not the folder of a run: there is no {METRICS}, {SUMMARY} or checkpoint in it."
    if inside:
        given = " ".join(str(path / name) for name in inside[:4])
        return f"{what} It holds runs: dist-optim report {given}{' ...' if len(inside) > 4 else ''}"
    return (
        f"{what} Give the --output_dir of launch/train.py, of any Trainer with RunReport among its callbacks, or a "
        "folder with a Trainer's checkpoints."
    )


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (METRICS, SUMMARY, f"{UNFINISHED}/{METRICS}")) or bool(
        _states_in(path)
    )


# Files -----------------------------------------------------------------------------------------------------------


def _read_files(run: Run, folder: Path) -> None:
    run.rows = _rows(run, _lines(run, folder / METRICS))
    run.summary = _object(run, folder / SUMMARY)
    run.about = _object(run, folder / ABOUT)
    if (folder / DECISIONS).is_file():
        found = [_decision(line) for line in _lines(run, folder / DECISIONS)]
        run.decisions = [one for one in found if one is not None]
        if len(run.decisions) < len(found):
            run.left_out.append(f"{DECISIONS}: {len(found) - len(run.decisions)} lines are not decisions.")


def _read_state(run: Run, path: Path) -> None:
    """Of a Trainer without our ``RunReport``."""
    history = _object(run, path).get("log_history")
    run.rows = _rows(run, [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else [])
    run.left_out.append(f"No {METRICS}: figures are those of {path.parent.name}/{STATE}, up to that checkpoint.")


def _text_of(run: Run, path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        run.left_out.append(f"{path.name} cannot be read: {error}.")
        return None


def _object(run: Run, path: Path) -> dict[str, Any]:
    text = _text_of(run, path)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.left_out.append(f"{path.name} is not JSON: {error}.")
        return {}
    if isinstance(found, dict):
        return found
    run.left_out.append(f"{path.name} holds no object.")
    return {}


def _lines(run: Run, path: Path) -> list[dict[str, Any]]:
    found, bad = [], []
    for number, line in enumerate((_text_of(run, path) or "").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict):
            found.append(row)
        elif row is not None:
            bad.append(number)
    if bad:
        run.left_out.append(f"{path.name}: {len(bad)} lines are not JSON objects, the first is line {bad[0]}.")
    return found


# Values ----------------------------------------------------------------------------------------------------------


def _rows(run: Run, found: Sequence[dict[str, Any]]) -> list[Row]:
    rows = [{str(key): _number(value) for key, value in row.items() if _is_figure(value)} for row in found]
    kept = [row for row in rows if row.get("step") is not None]
    if len(kept) < len(rows):
        run.left_out.append(f"{len(rows) - len(kept)} lines of metrics name no step.")
    return sorted(kept, key=lambda row: row["step"] or 0.0)


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> float | None:
    """Finite, or None."""
    try:
        return float(value) if value is not None and math.isfinite(value) else None
    except OverflowError:
        return None


def _decision(line: dict[str, Any]) -> Decision | None:
    old, new = (_first(line.get(key)) for key in ("old_lr", "new_lr"))
    step = line.get("step")
    if old is None or new is None or not _is_figure(step) or _number(step) is None:
        return None
    return Decision(float(step), str(line.get("decision")), old, new)  # type: ignore[arg-type]  # a number


def _first(values: Any) -> float | None:
    return _number(values[0]) if isinstance(values, list) and values and _is_figure(values[0]) else None


# What is missing -------------------------------------------------------------------------------------------------


def _say_what_is_missing(run: Run) -> None:
    if not run.rows:
        run.left_out.append(f"There are no figures in {METRICS}: no curves.")
    elif not any(key.startswith(TELEMETRY) for row in run.rows for key in row):
        run.left_out.append(
            "No telemetry (update ratios, times, bytes, clip rate): train with --telemetry, RunReport(telemetry=True)."
        )
    if not run.summary:
        run.left_out.append(f"No {SUMMARY}: the last figures are those of the last lines of metrics.")
    if not run.about:
        run.left_out.append(
            f"No {ABOUT}: no audit, coverage, settings and versions. RunReport writes it when a run begins."
        )
