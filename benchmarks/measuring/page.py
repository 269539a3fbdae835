"""docs/performance.md and its charts, written from docs/performance.json."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from measuring.charts import bars
from measuring.contenders import ALONE, OURS
from measuring.recipes import RECIPES
from measuring.results import DOCS, PAGE, Results
from measuring.tables import scale_table, share_table, table
from measuring.through_backward import ENGINE

__all__ = ["files_of", "write"]

LAYOUTS = {"fsdp2": "FSDP2", "ddp": "DDP", "zero1": "ZeRO-1", "zero3": "ZeRO-3", "none": "One process"}
CHARTED = (("fsdp2", 2), ("ddp", 2))


def write(results: Results) -> None:
    for path, text in files_of(results).items():
        path.write_text(text)


def files_of(results: Results) -> dict[Path, str]:
    """Every file that the results give, with its text."""
    files = {PAGE: page(results)}
    for layout, ranks in CHARTED:
        files[chart_path(layout, ranks)] = chart(results, layout, ranks)
    return files


def page(results: Results) -> str:
    """The page as it stands, with these results between its marks."""
    text = PAGE.read_text()
    blocks = {"about": where(results["about"]), "steps": steps(results), "counts": counted(results)}
    blocks |= {
        "small": small(results),
        "backward": backward(results),
        "apart": taken_apart(results),
        "share": share(results),
        "scale": scale_table(results["scale"]),
    }
    for name, block in blocks.items():
        before, mark, rest = text.partition(f"<!-- bench: {name} -->\n")
        _, end, after = rest.partition("<!-- bench: end -->")
        if not mark or not end:
            raise ValueError(f"{PAGE.name} lost the marks of {name!r}.")
        text = f"{before}{mark}\n{block}\n\n{end}{after}"
    return text


def steps(results: Results) -> str:
    """A section for each layout and number of ranks."""
    places = sorted({(cell["ranks"], cell["layout"]) for cell in results["cells"].values() if cell["ranks"] > 1})
    sections: list[str] = []
    for ranks, layout in sorted(places, key=lambda place: (place[0], list(LAYOUTS).index(place[1]))):
        if chosen := cells(results, layout, ranks, "matrices"):
            sections += [f"### {LAYOUTS[layout]}, {ranks} ranks", *picture(layout, ranks), speeds(chosen)]
    return "\n\n".join(sections)


def where(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    words = (
        f"Measured with {about['command']}, on {about['cores']} cores ({about['processor']}), "
        f"accelerator: {about['accelerator']}; Python {about['python']}, {packages}."
    )
    return textwrap.fill(words, 130, break_on_hyphens=False)


def cells(
    results: Results, layout: str, ranks: int, model: str, *, through_backward: bool = False, apart: bool = False
) -> dict[str, dict[str, Any]]:
    """Optimizer to contenders, in the recipes' order."""
    kind = {"is_through_backward": through_backward, "is_apart": apart}
    wanted = {"layout": layout, "ranks": ranks, "model": model, **kind}
    found = {
        cell["optimizer"]: cell["contenders"]
        for cell in results["cells"].values()
        if all(cell[key] == value for key, value in wanted.items())
    }
    return {name: found[name] for name in RECIPES if name in found}


def columns(chosen: dict[str, dict[str, Any]]) -> list[str]:
    """All contenders' names: one process first, ours last."""
    names = dict.fromkeys(name for rows in chosen.values() for name in rows)
    return [ALONE, *(name for name in names if name not in (ALONE, OURS)), OURS]


def speeds(chosen: dict[str, dict[str, Any]]) -> str:
    """Times and speeds; a second line for steps that refresh a projection; what failed, below."""
    names, lines = columns(chosen), []
    for optimizer, rows in chosen.items():
        for kind, label in (("steady", f"`{optimizer}`"), ("refresh", f"`{optimizer}`, refresh")):
            if kind in rows[ALONE]:
                lines.append([label, *(speed(rows.get(name), kind, name) for name in names)])
    return "\n\n".join([table(["", *names], lines), *failures(chosen)])


def speed(row: dict[str, Any] | None, kind: str, name: str) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return "fails"
    figures = row[kind]
    mark = " ≠" if row.get("distance") else ""
    ratio = "" if name in (ALONE, ENGINE) else f", {figures['processor_speed']:.2f} ×"
    return f"{figures['processor_ms']:.0f} ms{ratio}{mark}"


def failures(chosen: dict[str, dict[str, Any]]) -> list[str]:
    """What could not step, and whose weights are others."""
    lines = [
        f"- {name}, `{optimizer}`: `{row['refused'][:110].replace('`', '').strip()}`"
        if "refused" in row
        else f"- {name}, `{optimizer}`: weights differ by up to {row['distance']:.0e}"
        for optimizer, rows in chosen.items()
        for name, row in rows.items()
        if "refused" in row or row.get("distance")
    ]
    return ["\n".join(lines)] if lines else []


def counted(results: Results) -> str:
    """Counts of a steady step on two ranks."""
    parts: list[str] = []
    for layout, title in LAYOUTS.items():
        chosen = cells(results, layout, 2, "matrices")
        names = columns(chosen)
        if chosen:
            lines = [[f"`{one}`", *(counts(rows.get(name)) for name in names)] for one, rows in chosen.items()]
            parts.append(f"{title}:\n\n{table(['', *names], lines)}")
    return "\n\n".join(parts)


def counts(row: dict[str, Any] | None) -> str:
    if row is None or "refused" in row:
        return ""
    collectives = sum(row["collectives"].values())
    sent, allocated = row["sent_bytes"] / 1e6, row["allocated_bytes"] / 1e6
    return f"{collectives}, {sent:.1f} MB, {row['waits']}, {row['reads']}; {allocated:.0f} MB"


def small(results: Results) -> str:
    """What the wrapper costs."""
    parts = [
        f"{LAYOUTS[layout]}, {ranks} ranks:\n\n{speeds(chosen)}" if ranks > 1 else f"One process:\n\n{speeds(chosen)}"
        for layout, ranks in (("none", 1), ("fsdp2", 2))
        if (chosen := cells(results, layout, ranks, "small"))
    ]
    return "\n\n".join(parts)


def backward(results: Results) -> str:
    """Forward and backward counted in."""
    return "\n\n".join(
        f"{LAYOUTS[layout]}, 2 ranks:\n\n{speeds(chosen)}"
        for layout in LAYOUTS
        if (chosen := cells(results, layout, 2, "matrices", through_backward=True))
    )


def taken_apart(results: Results) -> str:
    """Large matrices, then small tensors."""
    return "\n\n".join(
        f"{LAYOUTS[layout]}, 2 ranks{words}:\n\n{speeds(chosen)}"
        for model, words in (("matrices", ""), ("small", ", 600 small tensors"))
        for layout in LAYOUTS
        if (chosen := cells(results, layout, 2, model, apart=True))
    )


def share(results: Results) -> str:
    """A table a layout."""
    found = sorted(results["shares"].values(), key=lambda cell: list(LAYOUTS).index(cell["layout"]))
    return "\n\n".join(
        share_table(
            cell["optimizers"],
            ", ".join([LAYOUTS[cell["layout"]], f"{cell['ranks']} ranks", *cell.get("options", {})]),
        )
        for cell in found
    )


def chart_path(layout: str, ranks: int) -> Path:
    return DOCS / f"performance_{layout}_{ranks}.svg"


def picture(layout: str, ranks: int) -> list[str]:
    if (layout, ranks) not in CHARTED:
        return []
    return [f"![Speed of a steady step under {LAYOUTS[layout]}]({chart_path(layout, ranks).name})"]


def chart(results: Results, layout: str, ranks: int) -> str:
    """Speeds of a steady step."""
    chosen = cells(results, layout, ranks, "matrices")
    values = {
        optimizer: {
            name: rows[name]["steady"]["processor_speed"]
            for name in columns(chosen)[1:]
            if "steady" in rows.get(name, {})
        }
        for optimizer, rows in chosen.items()
    }
    return bars(f"Speed of a steady step beside one process: {LAYOUTS[layout]}, {ranks} ranks", values, "×")
