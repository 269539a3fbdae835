"""The tables that people read, made from docs/parity.json and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_tables import ZERO, ZERO_GROUPS, zero_cells

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "parity.json"
DOCUMENT = ROOT / "docs" / "parity.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- table: begin (written by make parity) -->", "<!-- table: end -->"

Results = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One placement on one number of ranks; ``group`` is the README's column that it is counted in."""

    title: str
    group: str
    world_size: int
    placement: str
    variant: str = ""
    """What is changed in the case's shapes: a key of ``measure_parity.VARIANTS``."""


COLUMNS = (
    Column("one process", "one process", 1, "none"),
    Column("DDP, 2", "DDP", 2, "ddp"),
    Column("DDP, 3", "DDP", 3, "ddp"),
    Column("FSDP2 even, 2", "FSDP2 even", 2, "fsdp2", "even"),
    Column("FSDP2 even, 3", "FSDP2 even", 3, "fsdp2", "even"),
    Column("FSDP2 uneven, 2", "FSDP2 uneven", 2, "fsdp2"),
    Column("FSDP2 uneven, 3", "FSDP2 uneven", 3, "fsdp2"),
    Column("FSDP1, 2", "FSDP1", 2, "fsdp1"),
    Column("FSDP1, 3", "FSDP1", 3, "fsdp1"),
    Column("HSDP, 2 x 2", "HSDP", 4, "hsdp"),
    Column("TP, 2", "TP", 2, "tp"),
    Column("FSDP2 x TP, 2 x 2", "FSDP2 x TP", 4, "fsdp2 tp"),
    Column("HSDP x TP, 2 x 2 x 2", "HSDP x TP", 8, "hsdp tp"),
    Column("EP, 2 x 2", "EP", 4, "ep", "experts"),
)
NOT_INSIDE_BACKWARD = ("FSDP1", "TP", "FSDP2 x TP", "HSDP x TP", "EP")
"""Columns in which nothing is stepped inside backward."""
REFUSED = {("adalomo", "EP, 2 x 2")}
"""Cells of names whose upstream fails on tensors of three dims."""
GROUPS = tuple(dict.fromkeys(column.group for column in COLUMNS))

METHOD = """\
# Parity with upstream

Written by `make parity` from `docs/parity.json`, which the same command measures; do not edit.

Each figure is the largest difference, over all weights and all steps, between dist_optim and the upstream optimizer
alone in one process, relative to the largest weight of the tensor concerned. **0 means that every bit is equal** after
every step. Both sides start from the same weights and get the same gradients, which dist_optim's side receives cut as
the engine cuts them: this measures the optimizer, not the engine's reductions. Unless a case says otherwise, gradients
grow from step to step, so that clips and limiters bind; low-rank projections are computed three times; the learning
rate changes at every step and differs between param groups; one parameter is frozen, one never has a gradient, and one
has none at times. Where a tolerance is not 0, it is that of the case in `tests/cases/`.

Columns: the engine and the number of ranks (gloo, on CPU). *Uneven* is the case as it stands, with first dimensions
that 2 and 3 ranks do not divide, one of them smaller than 3. *Even* rounds every first dimension to a multiple of 6.
HSDP shards over 2 ranks and replicates twice. TP is torch's `parallelize_module`, by columns and by rows in turn, with
what is no linear layer on no axis of it; the other axes are those of `fully_shard` over it. EP adds two
stacks of experts to each case, over one axis of a mesh and cut by FSDP2 over the other, one of them between its
matrices and one inside them; FSDP2 cuts all else over all four ranks. To GaLore, APOLLO and Muon, upstream and here,
each expert is a matrix. *Interpreted kernels* are FlashOptim's CUDA kernels under Triton's interpreter; its other rows
are its mode without kernels. torchao's update runs uncompiled on both sides.
"""


def write_tables(results: Results) -> list[Path]:
    """Write docs/parity.md and the README's table."""
    DOCUMENT.write_text(document(results))
    README.write_text(with_table(README.read_text(), readme_table(results, zero_results())))
    return [DOCUMENT, README]


def document(results: Results) -> str:
    """docs/parity.md."""
    installed = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    served = [row for row in results["rows"] if not _is_refused(row)]
    header = ["case", "dtype", "steps", *(column.title for column in COLUMNS)]
    lines = [[_case(row), row["dtype"], str(row["steps"]), *map(_figure, row["cells"].values())] for row in served]
    parts = [
        METHOD,
        f"Measured with Python {results['python']}, {installed}.\n",
        _table(header, lines),
    ]
    if refused := [[f"`{n}`", why] for why, names in refusals(results).items() for n in names]:
        parts.append("## Refused\n\nThese names are registered, and refused on all ranks before anything is trained:\n")
        parts.append(_table(["name", "why"], refused))
    return "\n".join(parts)


def zero_results() -> Results | None:
    """What ``measure_zero`` measured; None where it has not."""
    return json.loads(ZERO.read_text()) if ZERO.exists() else None


def readme_table(results: Results, zero: Results | None = None) -> str:
    """One line a name: the worst figure of its cases."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["name"] == name]
        under_zero = ["refused"] * len(ZERO_GROUPS) if all(map(_is_refused, rows)) else zero_cells(zero, name)
        cells = [*(_worst(rows, group) for group in GROUPS), *(under_zero if zero else [])]
        lines.append([f"`{name}`", _cases(rows), *cells])
    reasons = [f"- {', '.join(f'`{n}`' for n in names)}: {why}" for why, names in refusals(results).items()]
    table = _table(["name", "cases", *GROUPS, *(ZERO_GROUPS if zero else [])], lines)
    return "\n".join([table, *(["Refused:", *reasons] if reasons else []), ""])


def with_table(text: str, table: str) -> str:
    """``text`` with what stands between the two marks replaced.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has lost the marks of its table. Put back {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def refusals(results: Results) -> dict[str, list[str]]:
    """Names by the reason for which they are refused."""
    found: dict[str, list[str]] = {}
    for row in filter(_is_refused, results["rows"]):
        for reason in dict.fromkeys(row["cells"].values()):
            found.setdefault(reason.removeprefix(f"{row['name']}: "), []).append(row["name"])
    return found


def exceeding(results: Results) -> Iterator[str]:
    """Every cell of a case that is refused or farther from upstream than the case allows, in words."""
    for row in results["rows"]:
        for column, cell in row["cells"].items():
            is_inside = row.get("inside_backward") and column.startswith(NOT_INSIDE_BACKWARD)
            may_refuse = is_inside or (row["name"], column) in REFUSED
            if not _is_refused(row) and not (may_refuse and isinstance(cell, str)) and not _is_within(cell, row):
                yield f"{_case(row)} {row['dtype']}, {column}: {cell}"


def _is_within(cell: float | str, row: Results) -> bool:
    return not isinstance(cell, str) and cell <= row["tolerance"]


def _is_refused(row: Results) -> bool:
    return "dtype" not in row


def _case(row: Results) -> str:
    return f"`{row['name']}` {row['label']}".strip()


def _cases(rows: list[Results]) -> str:
    dtypes = sorted({row["dtype"] for row in rows if "dtype" in row}, reverse=True)
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return f"{len(rows)}: {', '.join(short[dtype] for dtype in dtypes)}" if dtypes else ""


def _worst(rows: list[Results], group: str) -> str:
    titles = [column.title for column in COLUMNS if column.group == group]
    cells = [row["cells"][title] for row in rows for title in titles]
    figures = [cell for cell in cells if not isinstance(cell, str)]
    if figures and any(row.get("inside_backward") for row in rows):
        cells = figures  # a name is also stepped from stored gradients where it is not inside backward
    if any(isinstance(cell, str) for cell in cells):
        return "refused"
    return _figure(next((cell for cell in cells if cell != cell), max(cells)))  # a NaN is the worst


def _figure(cell: float | str) -> str:
    return cell if isinstance(cell, str) else "0" if cell == 0 else f"{cell:.1e}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])
