"""Rows as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["cell_table", "scale_table", "share_table", "table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_table(rows: dict[str, Any]) -> str:
    """All figures of one cell, a contender a row."""
    header = ["", "processor ms", "speed", "wall ms", "speed", "refresh ms", "speed", "collectives", "sent KB", "waits"]
    header += ["reads", "allocated KB", "in pieces", "distance"]
    return table(header, (cell_row(name, row) for name, row in rows.items()))


def cell_row(name: str, row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return [name, f"fails: {row['refused'][:90]}"]
    steady, refresh = row["steady"], row.get("refresh")
    cells = [f"{steady['processor_ms']:.1f}", f"{steady['processor_speed']:.2f} x"]
    cells += [f"{steady['wall_ms']:.1f}", f"{steady['wall_speed']:.2f} x"]
    cells += [f"{refresh['processor_ms']:.0f}", f"{refresh['processor_speed']:.2f} x"] if refresh else ["", ""]
    cells += [", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "0"]
    cells += [f"{row['sent_bytes'] / 1e3:,.0f}", str(row["waits"]), str(row["reads"])]
    cells += [f"{row['allocated_bytes'] / 1e3:,.0f}", str(row["allocations"])]
    distance = row.get("distance")
    return [name, *cells, "" if distance is None else f"{distance:.1e}" if distance else "0"]


def share_table(rows: dict[str, Any], title: str) -> str:
    """The optimizer's share of a training step, an optimizer a row."""
    has_bound = any("bound" in row for row in rows.values())
    header = [title, "forward, backward", "step", "share", "with backward", *(["bound"] if has_bound else [])]
    lines = [
        [
            name,
            f"{row['backward_ms']:.0f} ms",
            f"{row['step_ms']:.0f} ms",
            f"{row['share_of_step']:.1%}",
            f"{row['share_with_backward']:.1%}",
            *([f"{row['bound']:.1%}" if "bound" in row else ""] if has_bound else []),
        ]
        for name, row in rows.items()
    ]
    return table(header, lines)


def scale_table(rows: Sequence[dict[str, Any]]) -> str:
    """One rank of many, a rank a row."""
    header = ["ranks", "rank", "start-up", "step", "functions called", "collectives", "rounds", "memory", "audit"]
    lines = [
        [
            f"{row['world_size']:,}",
            f"{row['rank']}" + (", busiest" if row["rank"] == row["busiest_rank"] else ""),
            f"{row['start_up_s']:.2f} s",
            f"{row['step_ms']:.0f} ms",
            f"{row['calls']:,}",
            str(row["collectives"]),
            str(row["rounds"]),
            f"{row['memory_bytes'] / 1e6:.0f} MB",
            f"{row['audit_characters']:,} characters",
        ]
        for row in rows
    ]
    return table(header, lines)
