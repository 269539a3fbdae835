"""``make gpu``: what can be shown on one GPU in less than ten minutes; writes docs/gpu.json and docs/gpu.md.

    python benchmarks/gpu.py                                    # everything, on a GPU
    python benchmarks/gpu.py --parts decompositions llama_steps   # printed
    python benchmarks/gpu.py --device cpu --quick --out FILE      # a small form of everything, without a GPU
    python benchmarks/gpu.py --read FILE...                       # keep what --out wrote on another machine

Nothing is downloaded. Each part runs in a process of its own, within its time: what this machine cannot run is skipped
and named, what fails is recorded, and the rest goes on. The exit code is 1 where something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]  # its cases are measured here
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}

import torch  # noqa: E402

from measuring.on_gpu import page, results  # noqa: E402
from measuring.on_gpu.children import rows_of  # noqa: E402
from measuring.on_gpu.parts import PARTS, run_here  # noqa: E402
from measuring.on_gpu.rows import Log, Settings  # noqa: E402


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small form of each part")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON, after each part")
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        help="measure nothing: write docs/gpu.json and the page from these results, of a part from the last",
    )
    parser.add_argument("--child", metavar="LOG", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    if asked.read is None and asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. --device cpu --quick shows that the benchmark runs.")
    return asked


def main() -> int:
    asked = arguments()
    os.environ.update(OFFLINE)
    if asked.child is not None:
        run_here(asked.parts[0], Settings(device=asked.device, is_quick=asked.quick), Log(asked.child))
        return 0
    if asked.read is not None:
        keep_in_docs(together([json.loads(path.read_text()) for path in asked.read]))
        return 0
    start = time.perf_counter()
    found: results.GpuResults = {"about": {}, "parts": {}}
    untimed = [name for name in asked.parts if not PARTS[name].is_timed]
    rounds = [untimed, *([name] for name in asked.parts if PARTS[name].is_timed)]
    for beside in filter(None, rounds):
        print("; ".join(PARTS[name].title for name in beside), flush=True)
        with ThreadPoolExecutor(len(beside)) as pool:
            found["parts"] |= dict(zip(beside, pool.map(partial(ran, asked), beside), strict=True))
        found["about"] = results.about("make gpu", asked.device)
        if asked.out is not None:
            results.save(found, asked.out)
    if asked.device == "cuda" and not asked.quick and set(asked.parts) == set(PARTS):
        keep_in_docs(found)
    print(f"{time.perf_counter() - start:.0f} s; {num_failed(found)} failed")
    return int(num_failed(found) > 0)


def ran(asked: argparse.Namespace, name: str) -> results.PartResults:
    """A part, in processes of its own."""
    since, quick = time.perf_counter(), ["--quick"] if asked.quick else []
    command = [str(Path(__file__).resolve()), "--device", asked.device, *quick, "--parts", name, "--child"]
    rows = rows_of(PARTS[name], command)
    spent = time.perf_counter() - since
    print(f"{PARTS[name].title}: {page.summary(rows, spent)}", flush=True)
    return {"seconds": round(spent, 1), "rows": rows}


def together(read: Sequence[results.GpuResults]) -> results.GpuResults:
    """What was measured part by part; a part that ran on another GPU than the first says so."""
    about, versions = read[0]["about"], [one["about"]["packages"] for one in read]
    if any(one["about"]["accelerator"] == "none" for one in read) or any(one != versions[0] for one in versions):
        sys.exit("--read takes results of GPUs, with the same versions of all packages")
    parts: dict[str, results.PartResults] = {}
    for one in read:
        gpu = one["about"]["accelerator"]
        on = {} if gpu == about["accelerator"] else {"on": gpu}
        parts |= {name: {**part, **on} for name, part in one["parts"].items()}
    return {"about": about, "parts": parts}


def keep_in_docs(found: results.GpuResults) -> None:
    results.save(found, results.RESULTS)
    page.write(found)


def num_failed(found: results.GpuResults) -> int:
    return sum(row["status"] == "failed" for part in found["parts"].values() for row in part["rows"])


if __name__ == "__main__":
    sys.exit(main())
