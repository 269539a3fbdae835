"""docs/gpu.md, written from docs/gpu.json; without that, it says that nothing was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from measuring.on_gpu.parts import PARTS
from measuring.on_gpu.results import PAGE, GpuResults
from measuring.on_gpu.rows import Row
from measuring.tables import table

__all__ = ["NOTHING", "page", "summary", "write"]

START, END = "<!-- gpu: results -->\n", "<!-- gpu: end -->"
NOTHING = (
    "**Nothing is measured yet: this project has not been lent a GPU.** All figures elsewhere are of CPUs. On the CPU "
    "the benchmark runs in a small form (`--device cpu --quick`), which shows that it runs, and no more."
)


def write(found: GpuResults | None) -> None:
    PAGE.write_text(page(found))


def page(found: GpuResults | None) -> str:
    """The page as it stands, with these results between its marks.

    Raises:
        ValueError: The page has lost its marks.
    """
    before, start, rest = PAGE.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE.name} lost its marks.")
    block = textwrap.fill(NOTHING, 130) if found is None else results(found)
    return f"{before}{start}\n{block}\n\n{end}{after}"


def results(found: GpuResults) -> str:
    """Where, and a section for each part that ran."""
    sections = [where(found["about"])]
    for name, part in PARTS.items():
        if name in found["parts"]:
            sections.append(section(name, part.title, found["parts"][name]))
    return "\n\n".join(sections)


def where(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    words = (
        f"Measured with {about['command']}, on {about['accelerator']} ({about.get('memory_gb', 0)} GB; driver "
        f"{about.get('driver', 'none')}, CUDA {about.get('cuda', 'none')}), {about['cores']} cores "
        f"({about['processor']}); Python {about['python']}, {packages}."
    )
    return textwrap.fill(words, 130, break_on_hyphens=False)


def section(name: str, title: str, part: dict[str, Any]) -> str:
    rows = part["rows"]
    where_else = f" On {part['on']}." if "on" in part else ""
    blocks = [f"## {title}", summary(rows, part["seconds"]) + where_else]
    good = [row for row in rows if row["status"] == "ok"]
    if good and (header := COLUMNS.get(name)):
        lines = [[f"`{row['name']}`", *(text(row.get(key)) for key in header)] for row in good]
        blocks.append(table(["", *header.values()], lines))
    if others := [row for row in rows if row["status"] != "ok"]:
        blocks.append("\n".join(f"- {row['status']}: `{row['name']}`: {plain(row['reason'])}" for row in others))
    if notes := [row for row in good if "upstream_reason" in row]:
        blocks.append("\n".join(f"- upstream fails: `{row['name']}`: {plain(row['upstream_reason'])}" for row in notes))
    if name == "host_waits":
        blocks += places(good)
    return "\n\n".join(blocks)


COLUMNS = {
    "own_tests": {"passed": "passed", "skipped": "skipped", "same_weights": "same weights"},
    "llama_steps": {
        "ms": "ms",
        "upstream_ms": "upstream, ms",
        "peak_gb": "peak, GB",
        "upstream_peak_gb": "upstream, GB",
        "same_weights": "same weights",
    },
    "decompositions": {"ms": "ms", "runs": "runs"},
    "packed_copies": {
        "megabytes": "MB",
        "pack_gb_s": "packed, GB/s",
        "unpack_gb_s": "unpacked, GB/s",
        "foreach_copy_gb_s": "copied one by one, GB/s",
        "card_gb_s": "the card, GB/s",
    },
    "doors": {
        "first_loss": "validation loss before",
        "loss": "after 8 steps",
        "same_weights": "first steps verified",
        "state_mb": "state, MB",
    },
    "host_waits": {"waits": "waits", "upstream_waits": "upstream's"},
}
"""Figures of a row that are shown, with their titles; of equal bits the number of rows says all."""


def summary(rows: Sequence[Row], seconds: float) -> str:
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    return (
        f"{count['ok']} of {len(rows)} ran well, {count['failed']} failed, {count['skipped']} skipped; {seconds:.0f} s."
    )


def places(rows: Sequence[Row]) -> list[str]:
    """Where ours waits and upstream does not."""
    lines = []
    for row in rows:
        own = {place: count for place, count in row["places"].items() if place not in row.get("upstream_places", {})}
        if own:
            lines.append(f"- `{row['name']}`: {', '.join(f'{count} at `{place}`' for place, count in own.items())}")
    return ["Ours waits where upstream does not:\n\n" + "\n".join(lines)] if lines else []


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def plain(reason: str) -> str:
    """Without what Markdown would read."""
    return f"`{reason.replace('`', '').replace('|', '/')}`"
