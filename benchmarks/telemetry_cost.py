"""What telemetry costs a training step that it measures; others it leaves as they are.

``python benchmarks/telemetry_cost.py [--steps N]`` writes the table of docs/trainer.md. Two CPU ranks train the demo's
Llama with its batch; every second step is measured. Its cost is what stands before and after ``optimizer.step()``
(copies of the weights, norms, one all-reduce), with a barrier before it, so that no rank's wait counts. Medians.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.telemetry import Observer
from dist_optim.testing import RankPool

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "trainer.md"
BEGIN, END = "<!-- cost: begin (written by benchmarks/telemetry_cost.py) -->", "<!-- cost: end -->"
BATCH, LENGTH = 8, 256
GALORE: dict[str, Any] = {"target_modules": ["attn", "mlp"], "rank": 32, "update_proj_gap": 50}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("galore_adamw", "ddp", GALORE),
    ("galore_adamw", "fsdp2", GALORE),
    ("adamw_torch", "ddp", {}),
    ("adamw_torch", "fsdp2", {}),
)


def placed(layout: str) -> nn.Module:
    """The demo's model on this rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = json.loads((ROOT / "configs" / "models" / "llama_tiny.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**config))
    if layout == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def measured(name: str, layout: str, options: dict[str, Any], steps: int) -> dict[str, float]:
    """Median seconds of a whole step, and of what telemetry adds to one that it measures; this rank's."""
    model = placed(layout)
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-3, print_audit=False, **options)
    observer, whole, cost = Observer(optimizer), [], []
    for number in range(steps + 2):
        is_measured = number % 2 == 1
        tokens = torch.randint(0, 256, (BATCH, LENGTH))
        dist.barrier()
        marks = [time.perf_counter()]
        model(input_ids=tokens, labels=tokens).loss.backward()
        dist.barrier()
        marks.append(time.perf_counter())
        if is_measured:
            observer.begin()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        marks.append(time.perf_counter())
        if is_measured:
            observer.end()
        marks.append(time.perf_counter())
        if number < 2:  # of allocations that only first steps make
            continue
        added = marks[2] - marks[1] + marks[4] - marks[3]
        whole.append(marks[4] - marks[0] - added)
        if is_measured:
            cost.append(added)
    return {"step": statistics.median(whole), "cost": statistics.median(cost)}


def table(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    lines = ["| optimizer | layout | whole step | a measured step costs | of it | with a line every 10 steps |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, layout, found in rows:
        share = found["cost"] / found["step"]
        lines.append(
            f"| `{name}` | {layout} | {1e3 * found['step']:.0f} ms | {1e3 * found['cost']:.1f} ms | {share:.2%} | "
            f"{share / 10:.3%} |"
        )
    return "\n".join(lines)


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--print", action="store_true", help="and leave the page as it is")
    asked = parser.parse_args(given)
    with RankPool(2, timeout_s=600) as pool:
        rows = [
            (name, layout, pool.run(measured, name, layout, options, asked.steps)[0]) for name, layout, options in CASES
        ]
    text = table(rows)
    print(text)
    if not asked.print:
        page = PAGE.read_text()
        pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
        PAGE.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL))


if __name__ == "__main__":
    main(sys.argv[1:])
