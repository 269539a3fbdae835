"""The simulation plans as ``build_optimizer`` does, and its seconds follow from what it is told."""

from __future__ import annotations

import json

import pytest
import torch
from placements import place
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_optim
import simulate as page_of_simulations
from dist_optim.building.simulate import _end_of_broadcasts, _end_of_exchange
from dist_optim.errors import HyperparameterError
from dist_optim.exchange.plan import Plan
from dist_optim.testing import RankPool

MEASURE = "run `make simulate` and commit what it writes"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 8, bias=False))


def real_plan(sharding: str) -> Plan:
    model = DistributedDataParallel(net()) if sharding == "ddp" else place(net(), "fsdp2")
    return dist_optim.build_optimizer(model, "adafactor", lr=0.1, bucket_bytes=300, print_audit=False).plan


@pytest.mark.parametrize("sharding", ["fsdp2", "ddp"])
def test_rounds_and_bytes_are_those_of_the_real_plan(sharding: str, two_ranks: RankPool) -> None:
    plan = two_ranks.run(real_plan, sharding)[0]
    with torch.device("meta"):
        model = net()
    found = dist_optim.simulate(model, "adafactor", 2, sharding=sharding, lr=0.1, bucket_bytes=300)  # type: ignore[arg-type]
    fields = 1 if sharding == "ddp" else 3
    assert found.num_rounds == len(plan.buckets)
    assert found.sent_bytes == fields * sum(bucket.held_bytes // 2 for bucket in plan.buckets)


def test_seconds_follow_the_machine() -> None:
    def step(ranks: int, **machine: float) -> dist_optim.Simulation:
        return dist_optim.simulate(net(), "muon", ranks, machine=dist_optim.Machine(**machine), lr=0.1)  # type: ignore[arg-type]

    alone, two = step(1), step(2, link_bytes_per_s=1e30, latency_s=0.0)
    assert alone.exposed_s == 0 and alone.step_s == pytest.approx(alone.one_process_s) and alone.sent_bytes == 0
    assert two.step_s < alone.step_s and two.exposed_s == pytest.approx(0)
    slower = step(2, link_bytes_per_s=1.0)
    assert slower.exposed_s > 1 and slower.sent_bytes == two.sent_bytes


def test_rounds_overlap_as_they_do() -> None:
    # Gathered at 2; stepped to 5, while the next is gathered; back at 6, while the next is stepped to 8; back at 9.
    assert _end_of_exchange([3.0, 3.0], [2.0, 2.0], [1.0, 1.0]) == 9.0
    # One owner steps to 2 and 6, the other to 3: it waits for nobody.
    assert _end_of_broadcasts([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]], [1.0, 1.0, 1.0]) == (7.0, 6.0)


def test_what_is_no_sharding_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="'fsdp2' or 'ddp'"):
        dist_optim.simulate(net(), "muon", 2, sharding="zero", lr=0.1)  # type: ignore[arg-type]


def test_the_page_is_what_the_planner_says_today() -> None:
    results = json.loads(page_of_simulations.RESULTS.read_text())
    assert page_of_simulations.PAGE.read_text() == page_of_simulations.page(results), MEASURE
    assert set(results) == {", ".join(cell) for cell in page_of_simulations.CELLS}, MEASURE
    model = page_of_simulations.model_of("Llama-8B")
    for name in ("galore_adamw", "adamw_torch"):
        assert page_of_simulations.cell(model, "fsdp2", name) == results[f"Llama-8B, fsdp2, {name}"], MEASURE
