"""The committed figures cover what is asked today, and what is counted is counted right. No time is asserted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import steps
from dist_optim.testing import RankPool
from measuring import page, results
from measuring.apart import AGREED, COPIED, EACH, SLICES
from measuring.cells import Cell, measure
from measuring.contenders import ALONE, FLOOR, OURS, SHARE, Contender
from measuring.counting import allocations_of, traffic_counted
from measuring.share import STOCK, ShareCell
from measuring.timing import Sample, in_turn
from scale import WORLD_SIZES, figures_of

MEASURE = "run `make bench` and commit what it writes"


@pytest.fixture(scope="module")
def measured() -> results.Results:
    return results.load()


def test_page_and_charts_are_what_the_results_give(measured: results.Results) -> None:
    for path, text in page.files_of(measured).items():
        assert path.read_text() == text, f"{path.name}: {MEASURE}"


def test_every_cell_of_today_is_measured(measured: results.Results) -> None:
    jobs = steps.jobs(steps.arguments([]))
    assert set(measured["cells"]) == {str(job) for job in jobs if isinstance(job, Cell)}, MEASURE
    assert set(measured["shares"]) == {str(job) for job in jobs if isinstance(job, ShareCell)}, MEASURE
    assert {row["world_size"] for row in measured["scale"]} == set(WORLD_SIZES), MEASURE
    assert all(STOCK in cell["optimizers"] for cell in measured["shares"].values())


def test_ours_steps_in_every_cell_and_ends_on_the_weights_of_one_process(measured: results.Results) -> None:
    for name, cell in measured["cells"].items():
        ours = cell["contenders"][OURS]
        assert "refused" not in ours, f"{name}: {ours['refused']}"
        assert not ours["distance"], name


def test_a_page_without_its_marks_is_an_error(
    measured: results.Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "performance.md").write_text("nothing here")
    monkeypatch.setattr(page, "PAGE", tmp_path / "performance.md")
    with pytest.raises(ValueError, match="lost the marks of 'about'"):
        page.page(measured)


def test_contenders_step_in_turn_until_each_has_enough() -> None:
    calls: list[str] = []
    contenders = [
        Contender(name=name, prepare=partial(calls.append, f"prepare {name}"), step=partial(calls.append, name))
        for name in "ab"
    ]
    samples = in_turn(contenders, torch.device("cpu"), at_least=3, at_most=9, seconds=0.0)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 3
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}
    assert all(isinstance(one, Sample) and one.wall_s > 0 for taken in samples.values() for one in taken)


def traffic_of_known_collectives() -> dict[str, tuple[dict[str, int], float, int]]:
    """Of twelve floats on two ranks: what a ring sends, whoever starts it."""
    twelve, rank = torch.ones(12), dist.get_rank()
    sharded = distribute_tensor(torch.ones(12, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    acts = {
        "all-reduce": lambda: dist.all_reduce(twelve),
        "broadcast": lambda: dist.broadcast(twelve, 1),
        "even": lambda: dist.all_to_all_single(torch.empty(12), twelve),
        "to rank 0": lambda: dist.all_to_all_single(torch.empty(24 - 24 * rank), twelve, [12 - 12 * rank] * 2, [12, 0]),
        "gather": lambda: dist.all_gather([torch.empty(12) for _ in range(2)], twelve),
        "not waited for": lambda: dist.all_reduce(twelve, async_op=True),
        "DTensor": sharded.full_tensor,
        "none": lambda: dist.barrier(),
    }
    found = {}
    for name, act in acts.items():
        with traffic_counted() as traffic:
            pending = act()
        if isinstance(pending, dist.Work):
            pending.wait()
        found[name] = dict(traffic.collectives), traffic.sent_bytes, traffic.waits
    return found


def test_collectives_bytes_and_waits_are_seen_whoever_starts_them(two_ranks: RankPool) -> None:
    for rank, found in enumerate(two_ranks.run(traffic_of_known_collectives)):
        assert found == {
            "all-reduce": ({"allreduce": 1}, 2 * 48 / 2, 1),
            "broadcast": ({"broadcast": 1}, 48 / 2, 1),
            "even": ({"alltoall_base": 1}, 48 / 2, 1),
            "to rank 0": ({"alltoall_base": 1}, 48 * rank, 1),
            "gather": ({"allgather": 1}, 48, 1),
            "not waited for": ({"allreduce": 1}, 2 * 48 / 2, 0),
            "DTensor": ({"all_gather_into_tensor": 1}, 48, 1),
            "none": ({}, 0.0, 1),
        }


def test_allocations_are_those_that_torch_makes() -> None:
    kept = torch.ones(500)
    assert allocations_of(lambda: None) == []

    def act() -> None:
        torch.empty(250)
        kept.neg_()
        kept.neg()

    assert allocations_of(act) == [1000, 2000]


def measure_tiny() -> dict[str, dict[str, Any]]:
    return measure(Cell(optimizer="adafactor", layout="fsdp2", ranks=2, model="tiny", seconds=0.0))


def test_a_cell_has_every_contender_and_what_fails_is_a_result(two_ranks: RankPool) -> None:
    rows = two_ranks.run(measure_tiny)[0]
    assert set(rows) == {ALONE, "gather all", "DTensors", FLOOR, OURS}
    assert rows["DTensors"]["refused"].startswith("RuntimeError: aten.")  # transformers' Adafactor on DTensors
    assert rows[ALONE]["distance"] == rows["gather all"]["distance"] == rows[OURS]["distance"] == 0
    assert rows[ALONE]["collectives"] == {} and rows["gather all"]["collectives"] == {"all_gather_into_tensor": 7}
    assert rows[OURS]["sent_bytes"] > 0 and rows[OURS]["waits"] > 0


def measure_apart(optimizer: str, layout: str) -> dict[str, dict[str, Any]]:
    return measure(Cell(optimizer=optimizer, layout=layout, ranks=2, model="tiny", seconds=0.0, is_apart=True))


def test_a_step_taken_apart_ends_with_all_that_a_step_does(two_ranks: RankPool) -> None:
    sharded = two_ranks.run(measure_apart, "adafactor", "fsdp2")[0]
    assert list(sharded) == [ALONE, SHARE, FLOOR, COPIED, EACH, OURS]
    replicated = two_ranks.run(measure_apart, "adafactor", "ddp")[0]
    assert list(replicated) == [ALONE, SHARE, FLOOR, EACH, OURS]
    assert list(two_ranks.run(measure_apart, "adamw_torch", "fsdp2")[0]) == [ALONE, "DTensors", SLICES, AGREED, OURS]
    for rows in (sharded, replicated):
        assert rows[EACH]["distance"] == rows[OURS]["distance"] == 0
        assert rows[SHARE]["collectives"] == {} and rows[SHARE]["distance"] is None
        assert rows[SHARE]["allocated_bytes"] == rows[EACH]["allocated_bytes"]


def test_work_of_a_step_does_not_grow_with_ranks() -> None:
    """Of the busiest rank, which is rank 0 here: it owns as much of any number of ranks, or less."""
    few, many = figures_of(32, num_tensors=64), figures_of(512, num_tensors=64)
    assert few["busiest_rank"] == many["busiest_rank"] == 0
    assert many["calls"] <= few["calls"]  # fewer tensors of its own, and nothing for each rank
    assert many["collectives"] == few["collectives"]
    assert many["audit_characters"] < 1500
