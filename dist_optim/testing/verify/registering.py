"""The lines that make a name of a class that has none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dist_optim.specs.registry import OptimizerSpec, Trait, names
from dist_optim.specs.verdict import Verdict

__all__ = ["evidence_of", "snippet_of"]


def snippet_of(spec: OptimizerSpec) -> str:
    """Python that registers the class: with its hyperparameters read off its constructor, and proven at start-up."""
    optimizer_class: Any = spec.load_class()
    traits = ", ".join(f"Trait.{one.name}" for one in sorted(spec.traits, key=lambda one: list(Trait).index(one)))
    lines = [
        "import dist_optim",
        "from dist_optim import OptimizerSpec, Trait, UpstreamClass",
        "",
        "dist_optim.register(",
        "    OptimizerSpec(",
        f'        name="{_free_name(spec.name)}",',
        f'        load=UpstreamClass("{optimizer_class.__module__}", "{optimizer_class.__qualname__}"),',
        f'        package="{spec.package}",',
        f"        traits=frozenset({{{traits}}}),",
        "    )",
        ")",
    ]
    return "\n".join(lines)


def evidence_of(verdict: Verdict) -> list[str]:
    """What the proof found, a line each."""
    where = "each tensor is stepped, and its state kept, by one rank" if verdict.is_independent else "rank 0 steps all"
    return [
        f"independent: {'yes' if verdict.is_independent else 'no'} ({verdict.reason}): {where}",
        *(text for is_so, text in _findings(verdict) if is_so),
    ]


def _findings(verdict: Verdict) -> Iterator[tuple[bool, str]]:
    num_lines = sum(map(len, verdict.unreached.values()))
    yield verdict.steps_absent, "it also changes parameters that have no gradient"
    yield verdict.draws, "it draws random numbers"
    yield verdict.evaluations > 0, f"it evaluates a closure, {verdict.evaluations} times a step at most"
    yield num_lines > 0, f"{num_lines} of its lines were not reached, and are watched: a step that comes there raises"


def _free_name(class_name: str) -> str:
    """The class's name as names are written here, and not one that is taken."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).lower()
    return f"my_{plain}" if plain in names() else plain
