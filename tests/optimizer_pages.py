"""``make docs``: write what the registry knows into the pages of docs/optimizers; the rest of each page stays as it is.

A page is one family. Between its marks stand two tables, of names and of hyperparameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dist_optim.optimizers import (
    adafactor,
    adam_mini,
    apollo,
    bnb,
    flash,
    galore,
    grokadamw,
    layerwise,
    lomo,
    preconditioned,
    prodigy,
    pytorch_optimizer,
    schedulefree,
    stable,
    torch_native,
    torchao,
)
from dist_optim.specs.catalogue import install_line
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["BEGIN", "END", "FOLDER", "INDEX", "families", "page", "with_facts"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "optimizers"
INDEX = FOLDER / "README.md"
BEGIN, END = "<!-- facts: begin (written by make docs) -->", "<!-- facts: end -->"


def families() -> dict[str, tuple[OptimizerSpec, ...]]:
    """The specs of each page, by the page's file name without its ending."""
    inside = {spec.instead: spec for spec in layerwise.SPECS}

    def both(specs: Iterable[OptimizerSpec]) -> tuple[OptimizerSpec, ...]:
        specs = tuple(specs)
        return (*specs, *(inside[spec.name] for spec in specs if spec.name in inside))

    return {
        "galore": both(galore.SPECS),
        "apollo": both(apollo.SPECS),
        "flashoptim": tuple(flash.SPECS),
        "lomo": tuple(lomo.SPECS),
        "adafactor": tuple(adafactor.SPECS),
        "bitsandbytes": tuple(bnb.SPECS),
        "torchao": tuple(torchao.SPECS),
        "schedule-free": tuple(schedulefree.SPECS),
        "stable-adamw": tuple(stable.SPECS),
        "grokadamw": tuple(grokadamw.SPECS),
        "pytorch-optimizer": (*pytorch_optimizer.SPECS, *adam_mini.SPECS),
        "preconditioned": tuple(preconditioned.SPECS),
        "prodigy": tuple(prodigy.SPECS),
        "torch": tuple(torch_native.SPECS),
    }


def page(specs: tuple[OptimizerSpec, ...]) -> str:
    """The generated part of a family's page."""
    first = specs[0]
    about = [f"Package: `{first.package}`, {first.licence}. Install: `{install_line(first)}`."]
    papers = sorted({spec.paper for spec in specs if spec.paper})
    if papers:
        about.append(f"Papers: {', '.join(papers)}.")
    return "\n".join([*about, "", *_names(specs), "", *_hyperparameters(specs)])


def with_facts(text: str, facts: str) -> str:
    """A page with its generated part replaced.

    Raises:
        ValueError: The page has lost its marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page has lost the marks of its facts. Put back {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{facts}\n{END}{after}"


def index() -> str:
    """The generated part of the folder's first page: every name, its page, and its state."""
    lines = ["| name | what it is | state, bytes a parameter | page |", "| --- | --- | --- | --- |"]
    rows = sorted((spec.name, spec, family) for family, specs in families().items() for spec in specs)
    lines += [
        f"| `{name}` | {spec.summary} | {spec.state_bytes} | [{family}]({family}.md) |" for name, spec, family in rows
    ]
    return "\n".join(lines)


def _names(specs: tuple[OptimizerSpec, ...]) -> list[str]:
    lines = [
        "| name | what it is | state, bytes a parameter | a rank steps | needs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for spec in specs:
        needs = [*(["`target_modules`"] if Trait.LOW_RANK in spec.traits else []), *spec.needs]
        cells = (f"`{spec.name}`", spec.summary, spec.state_bytes, _unit(spec), "; ".join(needs) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _unit(spec: OptimizerSpec) -> str:
    """What travels: slices stay where they are, whole tensors meet at their owner."""
    defaults = {record.name: record.default for record in spec.records()}
    if spec.with_arguments(defaults).is_coupled:
        return "all tensors, at one owner"
    if Trait.LOW_RANK in spec.traits and Trait.ELEMENTWISE in spec.traits:
        return "low-rank matrices whole at their owners, the rest as slices"
    if Trait.BLOCKWISE in spec.traits and Trait.ELEMENTWISE in spec.traits:
        return "quantized tensors whole at their owners, others as slices"
    if Trait.ELEMENTWISE in spec.traits:
        return "its own slices; under DDP, tensors it owns"
    return "whole tensors, at their owners"


def _hyperparameters(specs: tuple[OptimizerSpec, ...]) -> list[str]:
    """One line a record; names that differ in it get lines of their own."""
    rows: dict[Hyperparameter, list[str]] = {}
    for spec in specs:
        for record in spec.records():
            rows.setdefault(record, []).append(spec.name)
    lines = ["| hyperparameter | values | default | meaning |", "| --- | --- | --- | --- |"]
    for record, names in sorted(rows.items(), key=lambda row: _order(specs, row[0])):
        only = "" if len(names) == len(specs) else f" ({_listed(specs, names)})"
        default = "required" if record.required else f"`{record.default!r}`"
        where = " One for all param groups." if record.scope is Scope.CONSTRUCTOR else ""
        where = " Of the low-rank matrices." if record.scope is Scope.MATRIX else where
        cells = (f"`{record.name}`{only}", record.describe_type(), default, f"{record.meaning.rstrip('.')}.{where}")
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return lines


def _order(specs: tuple[OptimizerSpec, ...], record: Hyperparameter) -> int:
    """Where the first name that has it lists it."""
    names: list[str] = []
    for spec in specs:
        names += [one.name for one in spec.records() if one.name not in names]
    return names.index(record.name)


def _listed(specs: tuple[OptimizerSpec, ...], names: list[str]) -> str:
    others = [spec.name for spec in specs if spec.name not in names]
    if len(others) < len(names):
        return f"not {', '.join(f'`{name}`' for name in others)}"
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    for family, specs in families().items():
        path = FOLDER / f"{family}.md"
        path.write_text(with_facts(path.read_text(), page(specs)))
    INDEX.write_text(with_facts(INDEX.read_text(), index()))


if __name__ == "__main__":
    main()
