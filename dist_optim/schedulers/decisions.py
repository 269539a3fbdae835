"""The log of learning-rate decisions: numbered rows, the same on every rank, written as JSON lines by one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_optim.errors import ScheduleError
from dist_optim.files import written_whole
from dist_optim.schedulers.metric import Reduced

__all__ = ["DecisionLog", "Row", "describe_decision", "make_row"]

Row = dict[str, Any]
"""``number`` (from 1), ``step``, ``metric`` (as reduced; None where none was finite), ``spread`` (lowest and highest of
the ranks' own metrics, and how many gave one), ``ignored_ranks``, ``decision``, ``old_lr`` and ``new_lr`` by group."""


def make_row(
    number: int, step: int | None, reduced: Reduced, decision: str, old: Sequence[float], new: Sequence[float]
) -> Row:
    """One decision as plain values."""
    return {
        "number": number,
        "step": step,
        "metric": reduced.metric,
        "spread": {"min": reduced.lowest, "max": reduced.highest, "ranks": reduced.num_ranks},
        "ignored_ranks": list(reduced.ignored_ranks),
        "decision": decision,
        "old_lr": list(old),
        "new_lr": list(new),
    }


def describe_decision(old: Sequence[float], new: Sequence[float], was_reset: bool) -> str:
    """``raised``, ``lowered``, ``kept``, ``reset``, or ``changed`` where groups went both ways."""
    if was_reset:
        return "reset"
    rises, falls = (
        any(after > before for before, after in zip(old, new, strict=True)),
        any(after < before for before, after in zip(old, new, strict=True)),
    )
    if rises and falls:
        return "changed"
    return "raised" if rises else "lowered" if falls else "kept"


class DecisionLog:
    """Rows in memory on every rank; on the writing rank also in a file that holds these rows and no others.

    Args:
        path: The file; None on ranks that do not write, and where no file was asked for.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = []
        self._is_ours = False  # until the first write the file may hold another run's decisions

    def add(self, row: Row) -> None:
        """Note a decision; its line is in the file, whole, when this returns.

        Raises:
            ScheduleError: The file cannot be written.
        """
        self.rows.append(row)
        if self.path is None:
            return
        if not self._is_ours:
            self._write_all()
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise self._cannot_write(error) from error

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of a saved run; those that the file has beyond them were never decided by this one."""
        self.rows = [dict(row) for row in rows]
        if self.path is not None and (self.rows or self.path.exists()):
            self._write_all()

    def _write_all(self) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.path) as draft:
                draft.write_text("".join(_line(row) for row in self.rows), encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from error
        self._is_ours = True

    def _cannot_write(self, error: OSError) -> ScheduleError:
        return ScheduleError(f"The log of decisions {str(self.path)!r} cannot be written: {error}. Give another path.")


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
