"""``make choosing``: the tables of docs/choosing.md, planned by ``dist_optim.planning``; nothing is trained.

python benchmarks/choosing.py     # writes docs/choosing.json, docs/choosing.svg, and the tables of docs/choosing.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.integrations.quiet import quieten_libraries
from dist_optim.planning import STRATEGIES, Forecast, PlannedModel, plan, read_model
from dist_optim.planning.charts import draw
from dist_optim.planning.tables import gib
from measuring.tables import table

__all__ = ["PAGE", "RESULTS", "largest_that_fits", "page", "planned"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE, CHART = DOCS / "choosing.json", DOCS / "choosing.md", DOCS / "choosing.svg"
BEGIN, END = "<!-- tables: begin (written by make choosing) -->", "<!-- tables: end -->"

MODEL, RANKS = "llama_8b", 8
JOB: dict[str, Any] = {"batch": 1, "length": 4096, "gradient_checkpointing": True}
COMPARED = ("adamw_torch", "galore_adamw", "adafactor", "muon")
MACHINES = ((1, 24), (2, 24), (8, 24), (1, 80), (8, 80), (64, 80))
"""GPUs, and GiB of each."""
SIZES = ("llama_1b", "llama_3b", "llama_8b", "llama_70b")
CHOICES = ("adamw_torch", "adamw_torch_8bit", "adafactor", "galore_adamw", "lomo")


def planned(model: PlannedModel, name: str, strategy: str) -> dict[str, Any]:
    """What the page says of one plan; in bf16 where the name's defaults take no fp32 weights."""
    for precision in ("mixed", "bf16"):
        try:
            return _kept(plan(model, name, strategy, RANKS, precision=precision, **JOB))
        except DistOptimError as error:
            refusal = str(error).partition(". ")[0].removeprefix(f"{name}: ").rstrip(".")
    return {"refused": refusal}


def _kept(one: Forecast) -> dict[str, Any]:
    return {
        "precision": one.precision,
        "state": one.memory["optimizer state"].max,
        "kept": sum(one.memory[key].max for key in ("weights", "gradients", "masters", "optimizer state")),
        "peak": one.peak.max,
        "sent": sum(one.wire.values()),
        "optimizer_s": round(one.optimizer_s, 6),
    }


def largest_that_fits(models: dict[str, PlannedModel], name: str, ranks: int, memory: float) -> str:
    """The largest of the packaged shapes, and the first strategy under which it fits."""
    strategies = ("one",) if ranks == 1 else ("ddp", "fsdp2", "zero3")
    for size in reversed(models):
        for strategy in strategies:
            if plan(models[size], name, strategy, ranks, gpu_memory_gib=memory, **JOB).fits:
                return f"{size.removeprefix('llama_').upper()}, {strategy}"
    return "none"


def measure() -> dict[str, Any]:
    models = {size: read_model(size) for size in SIZES}
    model = models[MODEL]
    return {
        "optimizers": {name: planned(model, name, "fsdp2") for name in dist_optim.names()},
        "strategies": {
            name: {strategy: planned(model, name, strategy) for strategy in STRATEGIES[1:]} for name in COMPARED
        },
        "sizes": {
            name: {f"{ranks} x {memory}": largest_that_fits(models, name, ranks, memory) for ranks, memory in MACHINES}
            for name in CHOICES
        },
    }


def tables(results: dict[str, Any]) -> str:
    served = {name: one for name, one in results["optimizers"].items() if "refused" not in one}
    order = sorted(served, key=lambda name: (served[name]["peak"], name))
    header = ["name", "state", "weights, gradients, masters, state", "peak", "sent", "step of the optimizer"]
    rows = [[_named(name, served[name]), *_cells(served[name])] for name in order]
    strategies = [
        [f"`{strategy}`", *(_short(results["strategies"][name][strategy]) for name in COMPARED)]
        for strategy in STRATEGIES[1:]
    ]
    sizes = [[f"`{name}`", *row.values()] for name, row in results["sizes"].items()]
    return "\n\n".join(
        [
            "### The largest Llama that fits\n\nBy GPUs and GiB of each: the size, and the first of DDP, FSDP2 and "
            "ZeRO-3 under which it fits.",
            table(["name", *(f"{ranks} x {memory}" for ranks, memory in MACHINES)], sizes),
            f"### Every optimizer: Llama-8B, FSDP2, {RANKS} GPUs\n\nGiB on the fullest; GB that it sends in a step.",
            table(header, rows),
            f"### Every strategy: Llama-8B, {RANKS} GPUs\n\nGiB on the fullest GPU: state; peak.",
            table(["", *(f"`{name}`" for name in COMPARED)], strategies),
        ]
    )


def _named(name: str, one: dict[str, Any]) -> str:
    return f"`{name}`" + (" (bf16 weights)" if one["precision"] == "bf16" else "")


def _cells(one: dict[str, Any]) -> list[str]:
    sizes = [gib(one[key]) for key in ("state", "kept", "peak")]
    return [*sizes, f"{one['sent'] / 1e9:.1f}", f"{one['optimizer_s'] * 1e3:,.1f} ms"]


def _short(one: dict[str, Any]) -> str:
    return "refused" if "refused" in one else f"{gib(one['state'])}; {gib(one['peak'])}"


def page(results: dict[str, Any]) -> str:
    """The page as it stands, with these results between its marks."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lost its marks.")
    return f"{before}{begin}\n\n{tables(results)}\n\n{end}{after}"


def main() -> None:
    quieten_libraries()
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    model = read_model(MODEL)
    found = [plan(model, "adamw_torch", strategy, RANKS, **JOB) for strategy in STRATEGIES[1:]]
    draw(found, STRATEGIES[1:], CHART, f"Llama-8B, adamw_torch, {RANKS} GPUs of 80 GiB")
    print(f"wrote {RESULTS.name}, {PAGE.name} and {CHART.name}")


if __name__ == "__main__":
    main()
