"""The tests that take a device: tests_multigpu on one rank, and parity on two ranks that share the GPU over gloo."""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fused import run_fused
from fused_cases import FUSED_CASES
from parity import Case, run_case

from dist_optim.testing import RankPool
from measuring.on_gpu.rows import Items, Settings, Skipped
from measuring.on_gpu.sides import one_case_a_name

__all__ = ["items"]

ROOT = Path(__file__).resolve().parents[3]
BUCKET_BYTES = 6000
NAMES = ("adamw_torch", "galore_adamw", "apollo_adamw", "adafactor", "muon", "adamw_bnb_8bit", "flash_adamw")
PLACEMENTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {},
    "fsdp1": {},
    "fsdp2 units": {"reduce_to_owner": True},
}
INSIDE_BACKWARD, INSIDE_BACKWARD_UNDER = ("lomo", "adamw_torch"), ("ddp", "fsdp2")
TIMEOUT_S = 60.0


def items(settings: Settings) -> Items:
    """One run of pytest, and a comparison an item on two ranks."""
    backend = "NCCL" if settings.device == "cuda" else "gloo"
    found: dict[str, Any] = {f"tests_multigpu, one rank, {backend}": partial(tests_multigpu, settings)}
    pool = RankPool(2, backend="gloo", timeout_s=TIMEOUT_S)  # the first item that uses it starts it
    atexit.register(pool.close)
    cases = one_case_a_name(settings)
    for name in NAMES[: 1 if settings.is_quick else None]:
        for placement, options in list(PLACEMENTS.items())[: 1 if settings.is_quick else None]:
            key = f"two ranks, gloo, {placement}: {cases[name]}"
            found[key] = partial(on_two_ranks, pool, run_case, cases[name], placement, **options)
    for case in () if settings.is_quick else _first_of(FUSED_CASES, INSIDE_BACKWARD):
        for placement in INSIDE_BACKWARD_UNDER:
            case = replace(case, device=settings.device)
            found[f"two ranks, gloo, {placement}: {case}"] = partial(on_two_ranks, pool, run_fused, case, placement)
    return found


def _first_of(cases: Iterable[Case], names: Iterable[str]) -> list[Case]:
    return [next(case for case in cases if case.name == name) for name in names]


def on_two_ranks(pool: RankPool, body: Any, case: Case, placement: str, **options: Any) -> dict[str, Any]:
    """Both ranks' tensors are on the same GPU.

    Raises:
        AssertionError: A weight differs from upstream's.
    """
    by_rank = pool.run(body, case, placement, bucket_bytes=BUCKET_BYTES, **options)
    problems = [problem for found in by_rank for problem in found]
    if problems:
        raise AssertionError(problems[0])
    return {"same_weights": True}


def tests_multigpu(settings: Settings) -> dict[str, Any]:
    """How many tests passed. Options of the project's own configuration need plugins, and are left out.

    Raises:
        AssertionError: One did not, or none ran.
    """
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    chosen = ["-k", "all_reduce or backend or (schedule_free and none)"] if settings.is_quick else []
    hidden = {} if settings.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        report = Path(folder) / "report.xml"
        command = [
            "-m",
            "pytest",
            "tests_multigpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            f"--junitxml={report}",
            *chosen,
        ]
        ran = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **hidden}, check=False)
        if not report.exists():
            raise AssertionError(f"pytest wrote no report: exit code {ran.returncode}")
        return counted(ElementTree.parse(report))


def counted(report: ElementTree.ElementTree[Any]) -> dict[str, Any]:
    tests = list(report.iter("testcase"))
    bad = [test.get("name", "") for test in tests if test.find("failure") is not None or test.find("error") is not None]
    skipped = sum(test.find("skipped") is not None for test in tests)
    if bad or not tests:
        raise AssertionError(f"{len(bad)} of {len(tests)} tests failed: {', '.join(bad[:4])}")
    return {"passed": len(tests) - skipped, "skipped": skipped}
