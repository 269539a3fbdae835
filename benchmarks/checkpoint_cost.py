"""What a save and a load cost, against ``torch.save`` and ``torch.load`` of the same bytes on the same disk.

``python benchmarks/checkpoint_cost.py [--rounds N] [--folder DIR]`` writes docs/checkpoint_cost.json, and the table of
docs/checkpoints.md from it. Each round does one of each, in turn, into files that were not there; figures are medians.
``torch.save`` is followed by an fsync, since ours is on the disk when it returns. What a load costs depends on whether
the memory that it fills is new, as in a process that resumes, or was used before: then it is two or three times as fast
without any work on pages. So both are measured, each as glibc is told.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dist_optim
from dist_optim.checkpoint import wait_for_saves
from dist_optim.testing import RankPool

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "checkpoint_cost.json", ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- cost: begin (written by benchmarks/checkpoint_cost.py) -->", "<!-- cost: end -->"
AGAIN = ", memory used before"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGE = -1, -3, 1 << 30
"""Of glibc's ``mallopt``: above how many bytes freed memory goes back, and memory is asked for by itself."""
LAYERS, WIDTH = 32, 1024
GALORE: dict[str, Any] = {"rank": 64, "target_modules": "all-linear"}
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("adamw_torch", 1, {}),
    ("galore_adamw", 1, GALORE),
    ("adamw_torch", 2, {}),
)
"""Name, ranks (FSDP2 where there are several), and what else the optimizer is built with."""


def built(name: str, options: dict[str, Any]) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    """A model of equal matrices that has taken a step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if dist.get_world_size() > 1:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-3, print_audit=False, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def measured(name: str, options: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Of every act in every round, seconds until the slowest rank is done, and processor seconds of this one."""
    model, optimizer = built(name, options)
    ours, stock, later, is_first = folder / "ours", folder / "stock.pt", folder / "later", dist.get_rank() == 0
    dist_optim.save_checkpoint(ours, model, optimizer)
    nbytes = sum(path.stat().st_size for path in ours.rglob("*") if path.is_file())
    whole = torch.randn(nbytes // (4 * WIDTH * WIDTH), WIDTH, WIDTH) if is_first else torch.empty(0)
    same = {"tensors": [one.clone() for one in whole]}
    del whole
    acts: dict[str, Callable[[], object]] = {
        "torch.save": lambda: _save_stock(same, stock) if is_first else None,
        "save": lambda: dist_optim.save_checkpoint(ours, model, optimizer),
        "asynchronous call": lambda: dist_optim.save_checkpoint(later, model, optimizer, asynchronous=True),
        "asynchronous rest": wait_for_saves,
        "torch.load": lambda: torch.load(stock) if is_first else None,
        "load": lambda: dist_optim.load_checkpoint(ours, model, optimizer),
    }
    acts |= {f"{act}{AGAIN}": acts[act] for act in ("torch.load", "load")}
    seconds: dict[str, list[float]] = {act: [] for act in acts}
    processor: dict[str, list[float]] = {act: [] for act in acts}
    for _ in range(rounds):
        if is_first:
            stock.unlink(missing_ok=True)
            shutil.rmtree(ours)
            shutil.rmtree(later, ignore_errors=True)
            os.sync()  # what is still to be written is nobody's
        for act, do in acts.items():
            _keep_freed_memory(act.endswith(AGAIN))
            if act.endswith(AGAIN):
                do()  # which uses it for the first time
            dist.barrier()
            begin, used = time.perf_counter(), time.process_time()
            do()
            processor[act].append(time.process_time() - used)
            dist.barrier()
            seconds[act].append(time.perf_counter() - begin)
    return {"nbytes": nbytes, "seconds": seconds, "processor": processor}


def _keep_freed_memory(is_kept: bool) -> None:
    """Whether the next act gets memory that was used before, or new memory of the system's."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, LARGE if is_kept else 1 << 17)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE if is_kept else 1 << 17)
    libc.malloc_trim(0)


def _save_stock(values: Any, path: Path) -> None:
    torch.save(values, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def row(name: str, num_ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the median of the ratios within a round."""

    def ratio(act: str, to: str, what: str = "seconds") -> float:
        pairs = zip(found[what][act], found[what][to], strict=True)
        return round(statistics.median(mine / theirs for mine, theirs in pairs), 2)

    return {
        "optimizer": name,
        "ranks": num_ranks,
        "megabytes": round(found["nbytes"] / 1e6),
        "save_ratio": ratio("save", "torch.save"),
        "asynchronous_call_ratio": ratio("asynchronous call", "torch.save"),
        "load_ratio": ratio("load", "torch.load"),
        "load_again_ratio": ratio(f"load{AGAIN}", f"torch.load{AGAIN}"),
        "save_processor_ratio": ratio("save", "torch.save", "processor"),
        "load_processor_ratio": ratio("load", "torch.load", "processor"),
        "load_again_processor_ratio": ratio(f"load{AGAIN}", f"torch.load{AGAIN}", "processor"),
        "seconds": {act: round(statistics.median(every), 3) for act, every in found["seconds"].items()},
    }


def table(results: dict[str, Any]) -> str:
    """The part of the page."""
    lines = [
        f"{LAYERS} matrices of {WIDTH} x {WIDTH} in fp32, and their state; medians of {results['rounds']} rounds,",
        f"each act in turn, on {results['cores']} cores; load average before: {results['load_average']}. Ratios are to",
        "`torch.save` (with an fsync) and `torch.load` of as many bytes, in the same round; in parentheses those of",
        "the first rank's processor time, which other jobs on the machine disturb less. A process that resumes loads",
        "into memory that is new to it; in one that has loaded before, both cost less, and what is left of ours is the",
        "second reading, the checksums, and 0.3 ms of Python a tensor.",
        "",
        f"| optimizer | ranks | MB | save | asynchronous save: until the call returns | load | load{AGAIN} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in results["rows"]:
        cells = [f"`{one['optimizer']}`", one["ranks"], one["megabytes"]]
        cells += [f"{one['save_ratio']} ({one['save_processor_ratio']})", one["asynchronous_call_ratio"]]
        cells += [f"{one['load_ratio']} ({one['load_processor_ratio']})"]
        cells += [f"{one['load_again_ratio']} ({one['load_again_processor_ratio']})"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_page(results: dict[str, Any]) -> str:
    """The page with its table made anew."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one otherwise")
    arguments = parser.parse_args()
    load_average = round(os.getloadavg()[0], 1)
    rows = []
    for name, num_ranks, options in CASES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, RankPool(num_ranks, timeout_s=900) as pool:
            found = pool.run(measured, name, options, arguments.rounds, Path(folder))[0]
        rows.append(row(name, num_ranks, found))
        print(json.dumps(rows[-1]), flush=True)
    cores = len(os.sched_getaffinity(0))
    results = {"rounds": arguments.rounds, "cores": cores, "load_average": load_average, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(write_page(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
