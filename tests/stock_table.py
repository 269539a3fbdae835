"""The second table of docs/situations.md: what a stock optimizer does in each situation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from situations import NOT_APPLICABLE
from stock_outcomes import DIES, HANGS, HANGS_AFTER_S, OFF, OTHERS_S, RAISES, RIGHT, ROUNDED, ROUNDING, Cell
from stock_sessions import STOCK

STOCK_RESULTS = Path(__file__).parent.parent / "docs" / "situations_stock.json"
StockRow = dict[str, Cell]

METHOD = f"""\
## What a stock optimizer does there

Written by `make parity` from `docs/situations_stock.json`. The same rows, with nothing of this project in a step:
torch's AdamW, unmodified, under the same engine, saved and loaded as its users do it (`torch.save` on rank 0 under DDP,
`torch.distributed.checkpoint` with `get_state_dict` under FSDP, the engine's own files under ZeRO); torch's Muon beside
it where a row has two optimizers, galore_torch's GaLore for the SVD, schedulefree's where one rank calls `eval()`. All
ranks have the same batch, or the mean of two is exact, so that an engine gives no reason to differ from one process.
Nothing is caught, and where the first table has a refusal the script goes on, or steps the gradients that it has: the
reference is then the one process to which it did not happen. A cell is measured:

- **right**: all ranks end, with every bit of one process that does the same with the same optimizer. With a number:
  they are off by that share of the way that the weights went, below {ROUNDING:g}, which is rounding.
- **off**: all ranks end, nothing is said, and the weights are off by that share of the way, or not a number (NaN).
  torch's Muon computes in bf16, where another order of sums makes 0.02.
- **raises**: that many ranks end with an error, whose text the number names. "rest waits": the others were still
  waiting {OTHERS_S:g} seconds later, for a process that was kept alive; when it ends, gloo fails in the others too.
- **dies**: a process is ended by a signal, without a Python error; **hangs**: no rank has ended after
  {HANGS_AFTER_S:g} seconds. What one rank calls alone meets another collective of the others: either may come of it.
"""


def load() -> dict[str, StockRow]:
    """What was measured: rows by title, of them cells by engine."""
    rows: dict[str, StockRow] = json.loads(STOCK_RESULTS.read_text()) if STOCK_RESULTS.exists() else {}
    return rows


def section(rows: dict[str, StockRow]) -> list[str]:
    """Its lines: the method, counts, the table, and the texts that its numbers and letters name."""
    texts, reasons = _distinct(rows, (RAISES, DIES)), _distinct(rows, (NOT_APPLICABLE,))
    titles = [engine.title for engine in STOCK]
    lines = [METHOD, counts(rows), "", f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    for title, row in rows.items():
        lines.append(f"| {title} | {' | '.join(_shown(row[engine], texts, reasons) for engine in titles)} |")
    lines += ["", "What is raised, in one line (`FOLDER`: the checkpoint's):", ""]
    lines += [f"{number}. {_no_link(text)}" for number, text in enumerate(texts, start=1)]
    lines += ["", "Why a cell does not apply:", ""]
    return [*lines, *(f"- [{letter(at)}] {reason}" for at, reason in enumerate(reasons))]


def _no_link(text: str) -> str:
    """As Markdown shows it, which takes brackets before a parenthesis for a link."""
    return text.replace("](", "]\\(")


def counts(rows: dict[str, StockRow]) -> str:
    """Of all cells that apply, in a sentence."""
    found = Counter(_kind(cell) for row in rows.values() for cell in row.values())
    total = sum(number for kind, number in found.items() if kind != NOT_APPLICABLE)
    several = found[PART] + found[DIES] + found[HANGS]
    return (
        f"Of {total} cells, {found[RIGHT]} are right, and {found[OFF]} are off without a word. {found[RAISES]} raise "
        f"on all\nranks; in {several} ranks part: {found[PART]} raise on some of them, {found[HANGS]} hang, "
        f"{found[DIES]} die."
    )


PART = "part"


def _kind(cell: Cell) -> str:
    if cell["kind"] == RAISES and " of " in str(cell.get("where", "")):
        return PART
    return RIGHT if cell["kind"] == ROUNDED else str(cell["kind"])


def _shown(cell: Cell, texts: Sequence[str], reasons: Sequence[str]) -> str:
    kind, where, size = str(cell["kind"]), str(cell.get("where", "")), cell.get("distance", 0)
    if kind == NOT_APPLICABLE:
        return f"- [{letter(reasons.index(str(cell['text'])))}]"
    if kind in (RAISES, DIES):
        return f"{kind} [{texts.index(str(cell['text'])) + 1}] {where}".strip()
    if kind == HANGS:
        return kind
    how_far = str(size) if isinstance(size, str) else f"{size:.0e}" if kind == ROUNDED else f"{size:g}"
    shown = {RIGHT: "right", ROUNDED: f"right ({how_far})", OFF: f"off {how_far}"}[kind]
    return f"{shown}, {where}" if where else shown


def _distinct(rows: dict[str, StockRow], kinds: Sequence[str]) -> list[str]:
    cells = [cell for row in rows.values() for cell in row.values()]
    return list(dict.fromkeys(str(cell["text"]) for cell in cells if cell["kind"] in kinds))


def letter(at: int) -> str:
    """Of the reason of this number: a to z, then aa."""
    first, last = divmod(at, 26)
    return (chr(ord("a") + first - 1) if first else "") + chr(ord("a") + last)
