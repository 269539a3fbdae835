"""What a step did, measured: right under every layout, into the metrics and trackers, and nothing where it is off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases.galore import CASES as GALORE
from end_to_end import make_llama
from parity import build_subject, make_model, reference_history, take_step
from placements import full_parameters, place
from trainers import Blocks, Job, arguments_of, fresh_accelerate

import dist_optim
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.run_report import RunReport
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.telemetry import Observer
from dist_optim.testing import RankPool, assert_equal

CASE = replace(GALORE[0], frozen=(), without_gradient=(), steps=4)


def observed(placement: str) -> tuple[list[dict[str, float]], list[list[float]], list[str]]:
    """Figures of each step, the same ratios from whole weights, and what is left on the optimizer."""
    model = place(make_model(CASE), placement)
    optimizer = build_subject(CASE, model)
    observer, figures, expected = Observer(optimizer), [], []
    observer.watch_clipping()
    for step in range(CASE.steps):
        before = full_parameters(model)
        with observer.step():
            take_step(CASE, model, optimizer, step)
        figures.append(observer.latest)
        after = full_parameters(model)
        expected.append([ratio(names, before, after) for names in optimizer.holdings.names_by_group()])
    assert_equal(full_parameters(model), reference_history(CASE)[-1], "an observed run is another run")
    observer.close()
    own = [key for one in (optimizer, *optimizer.holdings.instances) for key in vars(one)]
    return figures, expected, [key for key in own if key in ("step", "clip_grad_norm_")]


def ratio(names: list[str], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    norms = [torch.cat([one[name].flatten() for name in names]).double().norm() for one in (before, after)]
    moved = torch.cat([(after[name] - before[name]).flatten() for name in names]).double().norm()
    return float(moved / norms[0])


@pytest.mark.parametrize("placement", ["ddp", "fsdp2", "fsdp1"])
def test_ratios_are_those_of_whole_tensors_and_the_run_is_the_same(placement: str, two_ranks: RankPool) -> None:
    for figures, expected, left in two_ranks.run(observed, placement):
        assert not left
        for one, ratios in zip(figures, expected, strict=True):
            found = [one[f"update_ratio_group_{number}"] for number in range(len(ratios))]
            assert found == pytest.approx(ratios, rel=1e-6) and min(found) > 0
            assert 0 < one["upstream_seconds"] <= one["step_seconds"] and one["exchanged_bytes"] > 0
        assert [one["projections_renewed"] > 0 for one in figures] == [True, False, False, True], "the gap is 3"


def clipped() -> list[float]:
    model = place(make_model(CASE), "fsdp2")
    optimizer = build_subject(CASE, model)
    observer, rates = Observer(optimizer), []
    observer.watch_clipping()
    for bounds in ((1e9, 1e-9), (1e9, 1e9), ()):
        for bound in bounds:
            take_step(CASE, model, optimizer, 0)  # which injects gradients
            optimizer.clip_grad_norm_(bound)
        with observer.step():
            take_step(CASE, model, optimizer, 1)
        rates.append(observer.latest.get("clip_rate", -1.0))
    return rates


def test_the_clip_rate_is_the_share_of_steps_in_which_the_bound_binds(two_ranks: RankPool) -> None:
    assert two_ranks.run(clipped) == [[0.5, 0.0, -1.0]] * 2


@pytest.mark.parametrize(
    ("name", "options", "is_whole"),
    [
        ("adamw_torch", {}, True),
        ("muon", {}, False),
        ("galore_adamw", {"target_modules": ["1"]}, False),
    ],
)
def test_coverage_is_the_share_of_the_named_algorithm(name: str, options: dict[str, Any], is_whole: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 10))
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-3, print_audit=False, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    observer = Observer(optimizer)
    with observer.step():
        optimizer.step()
    total = sum(one.numel() for one in model.parameters())
    assert observer.latest["coverage"] == pytest.approx(1.0 if is_whole else 64 / total)
    assert observer.latest["exchanged_bytes"] == 0, "one process"


# Doors --------------------------------------------------------------------------------------------------------------


class Tracker(transformers.TrainerCallback):
    """Gets what TensorBoard and others get."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.seen.append(dict(logs))


def run(folder: Path, telemetry: bool) -> tuple[list[dict[str, Any]], Tracker]:
    job = Job("galore_adamw", settings={"max_steps": 4, "logging_steps": 2})
    with fresh_accelerate():
        torch.manual_seed(0)
        report, tracker = RunReport(telemetry=telemetry), Tracker()
        arguments = arguments_of(job, "alone", folder)
        trainer = Trainer(make_llama(), arguments, train_dataset=Blocks(), callbacks=[report, tracker])
        trainer.train()
        report.finish(trainer)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], tracker


def test_metrics_and_trackers_get_the_figures_of_the_steps_that_are_logged(tmp_path: Path) -> None:
    rows, tracker = run(tmp_path / "on", telemetry=True)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["optim_update_ratio_group_0"] > 0 and row["optim_step_seconds"] > 0 and row["optim_state_bytes"] > 0
        assert 0 < row["optim_coverage"] < 1
    logged = [one for one in tracker.seen if "loss" in one]
    assert [one["optim_step_seconds"] for one in logged] == [row["optim_step_seconds"] for row in rows]


def test_off_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, optimizer: DistributedOptimizer) -> None:
        raise AssertionError("observed")

    monkeypatch.setattr(Observer, "__init__", never)
    rows, _ = run(tmp_path / "off", telemetry=False)
    assert rows and not [key for row in rows for key in row if key.startswith("optim_")]
