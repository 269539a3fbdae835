"""``make simulate``: docs/simulation.md, from the real planner on models and machines that are not here.

python benchmarks/simulate.py                     # writes docs/simulation.json and the tables of docs/simulation.md
python benchmarks/simulate.py --network 12.5e9    # other links, printed: bytes a second that a rank sends between nodes
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

import dist_optim
from measuring.tables import table

__all__ = ["CELLS", "PAGE", "RESULTS", "cell", "page"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "simulation.json", DOCS / "simulation.md"

MODELS = {
    "Llama-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "galore_adamw": {"target_modules": "all-linear", "rank": 256},
    "muon": {},
    "adafactor": {},
    "adamw_torch": {},
}
SHARDINGS: tuple[Literal["fsdp2", "ddp"], ...] = ("fsdp2", "ddp")
RANKS = (8, 64, 512, 4096)
CELLS = [(model, sharding, name) for model in MODELS for sharding in SHARDINGS for name in OPTIMIZERS]


def model_of(name: str) -> nn.Module:
    """In bf16, on the meta device."""
    config = transformers.LlamaConfig(
        **MODELS[name], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
        return model.to(torch.bfloat16)


def cell(
    model: nn.Module, sharding: Literal["fsdp2", "ddp"], name: str, machine: dist_optim.Machine | None = None
) -> dict[str, dict[str, float]]:
    """One optimizer, by number of ranks."""
    found = {
        str(ranks): dist_optim.simulate(
            model, name, ranks, sharding=sharding, machine=machine, lr=1e-3, **OPTIMIZERS[name]
        )
        for ranks in RANKS
    }
    return {ranks: {key: round(value, 9) for key, value in asdict(one).items()} for ranks, one in found.items()}


def tables(results: dict[str, Any]) -> str:
    header = ["", *(f"{ranks:,} ranks" for ranks in RANKS)]
    blocks = []
    for model in MODELS:
        for sharding in SHARDINGS:
            rows = [
                [f"`{name}`", *(_words(one) for one in results[f"{model}, {sharding}, {name}"].values())]
                for name in OPTIMIZERS
            ]
            blocks.append(f"### {model}, {sharding.upper()}\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def _words(one: dict[str, float]) -> str:
    step, exposed = one["step_s"] * 1e3, one["exposed_s"] * 1e3
    sent, owner = one["sent_bytes"] / 1e9, one["owned_imbalance"]
    return f"{step:,.1f} ms, {exposed:,.1f} exposed; {sent:.2f} GB; owner {owner:,.1f} ×"


def page(results: dict[str, Any]) -> str:
    """The page as it stands, with these results between its marks."""
    before, mark, rest = PAGE.read_text().partition("<!-- simulation: begin (written by make simulate) -->\n")
    _, end, after = rest.partition("<!-- simulation: end -->")
    if not mark or not end:
        raise ValueError(f"{PAGE.name} lost its marks.")
    return f"{before}{mark}\n{tables(results)}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, help="bytes a second that a rank sends within a node")
    parser.add_argument("--network", type=float, help="bytes a second that a rank sends between nodes")
    asked = parser.parse_args()
    given = {"link_bytes_per_s": asked.link, "network_bytes_per_s": asked.network}
    given = {key: value for key, value in given.items() if value is not None}
    models = {name: model_of(name) for name in MODELS}
    results = {
        f"{model}, {sharding}, {name}": cell(models[model], sharding, name, dist_optim.Machine(**given))
        for model, sharding, name in CELLS
    }
    if given:
        print(tables(results))
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    print(f"wrote {RESULTS.name} and {PAGE.name}")


if __name__ == "__main__":
    main()
