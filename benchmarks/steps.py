"""``make bench``: a step of ours beside a step of what one would use instead, interleaved in one run.

    python benchmarks/steps.py                                                # everything; writes docs/performance.*
    python benchmarks/steps.py --only galore_adamw --layouts fsdp2 --ranks 2  # one cell, printed
    python benchmarks/steps.py --only muon --with '{"bucket_bytes": 1000000}'  # ours with other options as well

With ``--write`` a part replaces its own figures in docs/performance.json alone. ``--device cuda`` writes
docs/performance_cuda.json, and no page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks

import torch

import scale
from dist_optim.testing import RankFailure, RankPool
from measuring import page, results
from measuring.cells import Cell, measure
from measuring.contenders import OURS
from measuring.recipes import RECIPES
from measuring.share import ShareCell, measure_share
from measuring.tables import cell_table, scale_table, share_table

LAYOUTS = ("ddp", "fsdp2", "zero1", "zero3")
RANKS = (2, 4)
WIDER = ("galore_adamw", "adafactor", "adamw_torch")
"""Of each kind one: measured on more than two ranks, and through backward. Others are where they are asked for."""
THROUGH = {"fsdp2": ("galore_adamw", "apollo_adamw", "adafactor", "stable_adamw"), "ddp": WIDER}
"""Measured through backward, and taken apart."""
TO_OWNERS = {"reduce_to_owner": True}
PARTS = ("step", "backward", "small", "apart", "share", "scale")
LONGER = 6
"""Times as long where what is looked at is little of what is done: a step of many small tensors beside gathering them
all, or what a step takes beyond the engine's own forward and backward."""
TIMEOUT_S = 1200.0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), metavar="OPTIMIZER")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps in a cell, once each contender has a few")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--with", dest="options", type=json.loads, help="JSON: ours with these options as well")
    parser.add_argument("--write", action="store_true", help="keep a part's figures")
    asked = parser.parse_args(given)
    if asked.device == "cuda" and max(asked.ranks or ranks_on("cuda")) > torch.cuda.device_count():
        parser.error(f"--device cuda takes a GPU for each rank, and torch sees {torch.cuda.device_count()} here")
    if asked.write and asked.options:
        parser.error("--write keeps what everyone gets: leave --with out")
    return asked


def is_whole(asked: argparse.Namespace) -> bool:
    return not (asked.parts or asked.only or asked.layouts or asked.ranks or asked.options)


def ranks_on(device: str) -> tuple[int, ...]:
    """As many as there are GPUs, where it is to run on those."""
    most = torch.cuda.device_count() if device == "cuda" else max(RANKS)
    return tuple(number for number in RANKS if number <= most) or (1,)


def jobs(asked: argparse.Namespace) -> list[Cell | ShareCell]:
    """What was asked for, by number of ranks, so that each pool is started once."""
    parts = asked.parts or (PARTS if is_whole(asked) else ("step",))
    names, layouts = tuple(asked.only or RECIPES), asked.layouts or LAYOUTS
    ranks = asked.ranks or ranks_on(asked.device)
    two = min(2, max(ranks))
    found: list[Cell | ShareCell] = []
    if "small" in parts:
        found += [cell(asked, "adamw_torch", *place, "small") for place in (("none", 1), ("fsdp2", two))]
    if "step" in parts:
        found += [
            cell(asked, name, layout, number)
            for number in ranks
            for layout in layouts
            for name in names
            if not is_whole(asked) or number <= 2 or (name in WIDER and not layout.startswith("zero"))
        ]
    served = [one for one in layouts if not one.startswith("zero")]
    kinds: dict[str, dict[str, Any]] = {"backward": {"is_through_backward": True}, "apart": {"is_apart": True}}
    found += [
        cell(asked, name, layout, two, **kind)
        for part, kind in kinds.items()
        if part in parts
        for layout in served
        for name in names
        if asked.only or name in THROUGH[layout]
    ]
    if "apart" in parts and "fsdp2" in served:
        found.append(cell(asked, "adamw_torch", "fsdp2", two, "small", is_apart=True))
    if "share" in parts:
        found += [
            ShareCell(layout=one, ranks=two, optimizers=names, device=asked.device, options=options)
            for one in served
            for options in ({}, TO_OWNERS)
        ]
    return sorted(found, key=lambda job: job.ranks)


def cell(
    asked: argparse.Namespace, name: str, layout: str, ranks: int, model: str = "matrices", **options: Any
) -> Cell:
    variants = {f"{OURS} {json.dumps(asked.options)}": asked.options} if asked.options else {}
    if options.get("is_through_backward"):
        variants[f"{OURS}, reduce_to_owner"] = TO_OWNERS
    return Cell(
        optimizer=name,
        layout=layout,
        ranks=ranks,
        model=model,
        seconds=asked.seconds * (LONGER if model == "small" or options.get("is_through_backward") else 1),
        device=asked.device,
        variants=variants,
        **options,
    )


def run(pool: RankPool, job: Cell | ShareCell, found: results.Results) -> bool:
    """Measure it on the pool's ranks, print it, and put it among the results; whether that went well."""
    start = time.perf_counter()
    try:
        rows: dict[str, Any] = pool.run(measure if isinstance(job, Cell) else measure_share, job)[0]
    except RankFailure as failure:
        print(f"{job}: {failure}", flush=True)
        return False
    if isinstance(job, Cell):
        text = cell_table(rows)
        found["cells"][str(job)] = {**described(job), "contenders": rows}
    else:
        text = share_table(rows, str(job))
        found["shares"][str(job)] = {**described(job), "optimizers": rows}
    print(f"\n{job} ({time.perf_counter() - start:.0f} s)\n{text}", flush=True)
    return True


def described(job: Cell | ShareCell) -> dict[str, Any]:
    names = ("optimizer", "layout", "ranks", "model", "is_through_backward", "is_apart", "options")
    return {name: getattr(job, name) for name in names if hasattr(job, name)}


def main() -> int:
    asked = arguments()
    start = time.perf_counter()
    found = results.load(asked.device)
    if is_whole(asked):
        found = results.nothing()
    found["about"] = results.about("make bench" if is_whole(asked) else "make bench, in parts", asked.device)
    failed = 0
    for ranks, wanted in groupby(jobs(asked), key=lambda job: job.ranks):
        with RankPool(ranks, backend="nccl" if asked.device == "cuda" else "gloo", timeout_s=TIMEOUT_S) as pool:
            failed += sum(not run(pool, job, found) for job in wanted)
    if is_whole(asked) or "scale" in (asked.parts or ()):
        found["scale"] = scale.rows()
        print(scale_table(found["scale"]))
    if is_whole(asked) or asked.write:
        results.save(found, asked.device)
        if asked.device == "cpu":
            page.write(found)
    print(f"{time.perf_counter() - start:.0f} s; {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
