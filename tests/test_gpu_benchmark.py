"""The benchmark for one GPU: its parts run in their smallest form, and nothing that goes wrong in one ends the rest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import Case

from dist_optim.errors import MissingPackageError, UnsupportedError
from dist_optim.testing import RankFailure, RankPool
from measuring.on_gpu import decompositions, equal_bits, host_waits, llama_steps, packed_copies, page
from measuring.on_gpu.children import rows_of
from measuring.on_gpu.host_waits import waits_of
from measuring.on_gpu.parts import PARTS, Part
from measuring.on_gpu.results import PAGE, load
from measuring.on_gpu.rows import Row, Settings, Skipped, attempt, outcome
from measuring.on_gpu.sides import one_case_a_name

QUICK = Settings(device="cpu", is_quick=True)


def test_page_is_what_the_results_give() -> None:
    assert PAGE.read_text() == page.page(load()), "run `make gpu`, or write the page again"


def test_all_parts_together_take_less_than_ten_minutes() -> None:
    beside, alone = ([part.seconds for part in PARTS.values() if part.is_timed is timed] for timed in (False, True))
    assert max(beside) + sum(alone) < 560  # and what processes take to end


def smallest_of_each_part() -> list[Row]:
    rows = []
    for part in (equal_bits, llama_steps, decompositions, packed_copies, host_waits):
        items = part.items(QUICK)
        chosen = [name for name in items if "galore" not in name and "muon" not in name]
        rows += [attempt(name, items[name]) for name in chosen]
    return rows


def test_every_part_runs_in_its_smallest_form(one_rank: RankPool) -> None:
    (rows,) = one_rank.run(smallest_of_each_part)
    assert [row["reason"] for row in rows if row["status"] != "ok"] == ["FlashOptim's kernels need a GPU"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["adamw_torch"]["same_weights"] and by_name["lomo, inside backward"]["same_weights"]
    assert by_name["a packed round"]["waits"] == 0


def another_reference(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, eps=1e-3)


def compared_with_another() -> Row:
    case: Case = replace(one_case_a_name(QUICK)["adamw_torch"], make_reference=another_reference)
    return attempt("another", lambda: equal_bits.compared(case, QUICK))


def test_other_weights_are_a_failure(one_rank: RankPool) -> None:
    (row,) = one_rank.run(compared_with_another)
    assert row["status"] == "failed" and "differs after step 0" in row["reason"]


def test_reads_of_a_value_are_counted() -> None:
    assert waits_of(lambda: torch.ones(1).item(), QUICK) == {"reads": 1}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Skipped("why"), "skipped"),
        (MissingPackageError("why"), "skipped"),
        (UnsupportedError("why"), "skipped"),
        (torch.OutOfMemoryError("why"), "skipped"),
        (RankFailure("body", tracebacks={1: "Traceback:\n  a line\ntorch.OutOfMemoryError: why\n"}), "skipped"),
        (RankFailure("body", tracebacks={1: "Traceback:\n  a line\nValueError: why\n"}), "failed"),
        (RankFailure("why", exit_codes={1: -9}), "failed"),
        (ValueError("why"), "failed"),
    ],
)
def test_what_the_machine_lacks_is_skipped_and_all_else_failed(error: Exception, status: str) -> None:
    found = outcome(error)
    assert found["status"] == status and "why" in found["reason"]


CHILD = """
import json, os, sys, time

def tell(**line):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(line) + "\\n")

acts = {"first": lambda: None, "crash": os.abort, "between": lambda: None, "hang": lambda: time.sleep(60),
        "last": lambda: None}
lines = open(sys.argv[1]).read() if os.path.exists(sys.argv[1]) else ""
tell(names=[*acts, *sys.argv[2:]])
for name, act in acts.items():
    if f'"row": {{"name": "{name}"' not in lines:
        tell(begins=name)
        act()
        tell(row={"name": name, "status": "ok", "seconds": 0.0})
"""


def test_what_crashes_or_hangs_is_recorded_and_the_rest_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in rows_of(Part(title="", seconds=30, item_seconds=1), ["-c", CHILD])}
    assert {name: row["status"] for name, row in rows.items()} == {
        "first": "ok",
        "crash": "failed",
        "between": "ok",
        "hang": "failed",
        "last": "ok",
    }
    assert "SIGABRT" in rows["crash"]["reason"] and "still ran after 1 s" in rows["hang"]["reason"]


@pytest.mark.parametrize(
    ("command", "seconds", "status", "why"),
    [
        (["-c", CHILD.replace("os.abort", "lambda: time.sleep(60)")], 1.0, "skipped", "no time was left"),
        (["-c", "raise SystemExit(3)"], 20.0, "skipped", "its process ended with exit code 3"),
    ],
)
def test_what_was_never_reached_is_named(command: list[str], seconds: float, status: str, why: str) -> None:
    last = rows_of(Part(title="", seconds=seconds), command)[-1]
    assert last["status"] == status and why in last["reason"]


def test_page_names_what_was_skipped_and_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [
        {"name": "a", "status": "ok", "seconds": 1.0, "ms": 12.5, "upstream_ms": None, "same_weights": True},
        {"name": "b", "status": "skipped", "seconds": 0.0, "reason": "no | memory"},
        {"name": "c", "status": "failed", "seconds": 0.0, "reason": "ValueError: `x`"},
    ]
    about = {"command": "a test", "accelerator": "none", "cores": 1, "processor": "p", "python": sys.version[:4]}
    made_up = {"about": {**about, "packages": {}}, "parts": {"llama_steps": {"seconds": 2.0, "rows": rows}}}
    text = page.page(made_up)
    assert "1 of 3 ran well, 1 failed, 1 skipped; 2 s." in text and "| `a` | 12.5 |  |  |  | yes |" in text
    assert "- skipped: `b`: `no / memory`" in text and "- failed: `c`: `ValueError: x`" in text
    (tmp_path / "gpu.md").write_text("nothing here")
    monkeypatch.setattr(page, "PAGE", tmp_path / "gpu.md")
    with pytest.raises(ValueError, match="lost its marks"):
        page.page(None)
