"""What a step did, measured: right under every layout, into the metrics and trackers, and nothing where it is off."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import transformers
import zero
from cases.galore import CASES as GALORE
from end_to_end import make_llama
from parity import build_subject, make_model, reference_history, take_step
from placements import full_parameters, place
from trainers import Blocks, Job, arguments_of, fresh_accelerate

import dist_optim
from dist_optim.exchange.clock import timed, use_clock
from dist_optim.exchange.tasks import Task
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.run_report import RunReport
from dist_optim.telemetry import Observer
from dist_optim.telemetry import ratios as ratios_file
from dist_optim.telemetry.clock import StepClock
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
            assert one["exchanged_bytes"] > 0
            assert_parts_of_a_step(one)
        assert [one["projections_renewed"] > 0 for one in figures] == [True, False, False, True], "the gap is 3"


def assert_parts_of_a_step(figures: dict[str, float], travels: bool = True) -> None:
    upstream, *ways = (figures[f"{what}_seconds"] for what in ("upstream", "gather", "scatter"))
    assert upstream > 0 and [way > 0 for way in ways] == [travels] * 2
    assert upstream + sum(ways) <= figures["step_seconds"]


def observed_in_engine(stage: int) -> tuple[list[dict[str, float]], list[list[float]], bool, float]:
    """Figures of each step under ZeRO, the same ratios from whole weights, what is left, and how far the run ends."""
    options = {"lr": 1e-2, "no_decay": zero.NO_DECAY, **zero.GALORE}
    config = {"gradient_clipping": 1e-3}
    run = zero.ZeroRun("galore_adamw", options, stage, config=config)
    plain = zero.engine_of(run)
    zero.train_engine(plain, run, range(4))
    engine = zero.engine_of(run)
    optimizer = engine.basic_optimizer
    observer, figures, expected = Observer(optimizer), [], []
    had = dict(vars(optimizer))
    names = [name for name, _ in engine.module.named_parameters()]
    for step in range(4):
        before = dict(zip(names, zero.weights_of(engine, run), strict=True))
        with observer.step():
            zero.train_engine(engine, run, range(step, step + 1))
        observer.note_engine_clipping()
        figures.append(observer.latest)
        after = dict(zip(names, zero.weights_of(engine, run), strict=True))
        groups = optimizer.parts()[0].holdings.names_by_group()
        expected.append([ratio(group, before, after) for group in groups])
    observer.close()
    same = [torch.equal(*pair) for pair in zip(zero.weights_of(engine, run), zero.weights_of(plain, run), strict=True)]
    is_left = vars(optimizer).get("step") is had.get("step")
    return figures, expected, is_left, all(same)


@pytest.mark.parametrize("stage", range(4))
def test_under_deepspeed_the_same(stage: int, two_ranks: RankPool) -> None:
    pytest.importorskip("deepspeed")
    for figures, expected, is_as_before, is_same in two_ranks.run(observed_in_engine, stage):
        assert is_as_before and is_same
        for one, ratios in zip(figures, expected, strict=True):
            found = [one[f"update_ratio_group_{number}"] for number in range(len(ratios))]
            assert found == pytest.approx(ratios, rel=1e-4) and min(found) > 0
            assert_parts_of_a_step(one, travels=stage > 0)
        assert [one["projections_renewed"] > 0 for one in figures] == [True, False, False, True], "the gap is 3"
        assert ["refresh_seconds" in one for one in figures] == [True, False, False, True]
        noted = 1.0 if stage else None  # in fp32 stage 0 keeps no norm
        assert [one.get("clip_rate") for one in figures] == [None, *[noted] * 3], "noted after each step"


def test_a_clock_that_runs_on_is_seen() -> None:
    """Negative control of the parts of a step."""
    figures = {"step_seconds": 1.0, "gather_seconds": 0.5, "upstream_seconds": 0.5, "scatter_seconds": 0.1}
    with pytest.raises(AssertionError):
        assert_parts_of_a_step(figures)


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


def run(folder: Path, telemetry: bool, **settings: Any) -> tuple[list[dict[str, Any]], Tracker]:
    job = Job("galore_adamw", settings={"max_steps": 4, "logging_steps": 2, **settings})
    with fresh_accelerate():
        torch.manual_seed(0)
        report, tracker = RunReport(telemetry=telemetry), Tracker()
        arguments = arguments_of(job, "alone", folder)
        trainer = Trainer(make_llama(), arguments, train_dataset=Blocks(), callbacks=[tracker])
        trainer.callback_handler.callbacks.insert(1, report)  # before trackers
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


def test_refreshes_between_lines_are_counted_and_timed(tmp_path: Path) -> None:
    """The gap is 3: the first and the fourth step renew, and neither is the last before the line of step 3."""
    rows, _ = run(tmp_path / "run", True, logging_steps=3, logging_first_step=False)
    assert [row["step"] for row in rows] == [3, 4]
    assert rows[0]["optim_projections_renewed"] == rows[1]["optim_projections_renewed"] > 0
    assert rows[0]["optim_refresh_seconds"] > 0 and rows[1]["optim_refresh_seconds"] > 0


def run_on_ranks(folder: str, strategy: str) -> list[dict[str, Any]]:
    job = Job("galore_adamw", settings={"max_steps": 2, "logging_steps": 1, "max_grad_norm": 1e-3})
    with fresh_accelerate():
        torch.manual_seed(0)
        report = RunReport(telemetry=True)
        arguments = arguments_of(job, strategy, folder)
        trainer = Trainer(make_llama(), arguments, train_dataset=Blocks(), callbacks=[report])
        trainer.train()
    return report.rows


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_the_trainer_tells_it_under_every_engine(strategy: str, tmp_path: Path, two_ranks: RankPool) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    for rows in two_ranks.run(run_on_ranks, str(tmp_path), strategy):
        for row in rows:
            assert row["optim_update_ratio_group_0"] > 0 and row["optim_clip_rate"] == 1.0
            assert 0 < row["optim_gather_seconds"] + row["optim_scatter_seconds"] < row["optim_step_seconds"]


# Off ----------------------------------------------------------------------------------------------------------------


def calls_of_a_clock(telemetry: bool, folder: Path) -> list[str]:
    """What a run asks of the clock, and copies of weights that it makes."""
    calls: list[str] = []

    def counting(name: str, call: Any) -> Any:
        def counted(*args: Any, **named: Any) -> Any:
            calls.append(name)
            return call(*args, **named)

        return counted

    counted = {
        "dist_optim.telemetry.clock.StepClock.now": StepClock.now,
        "dist_optim.telemetry.observer.Observer.begin": Observer.begin,
        "dist_optim.telemetry.ratios._copy": ratios_file._copy,
        "dist_optim.telemetry.clock.use_clock": use_clock,
    }
    with ExitStack() as stack:
        for name, call in counted.items():
            stack.enter_context(mock.patch(name, counting(name.rpartition(".")[2], call)))
        rows, _ = run(folder, telemetry)
    assert rows and telemetry == any(key.startswith("optim_") for row in rows for key in row)
    return calls


def test_off_is_free(tmp_path: Path) -> None:
    assert calls_of_a_clock(False, tmp_path / "off") == []
    assert {"now", "begin", "_copy", "use_clock"} == set(calls_of_a_clock(True, tmp_path / "on")), (
        "or nothing is counted"
    )


def test_where_nobody_measures_what_travels_is_not_wrapped() -> None:
    def task() -> Task[int]:
        yield
        return 1

    plain = task()
    assert timed("gather", plain) is plain


def test_the_measured_cost_is_under_a_hundredth_of_a_step() -> None:
    """As `benchmarks/telemetry_cost.py` found and wrote it."""
    page = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text()
    written = page.partition("<!-- cost: begin")[2].partition("<!-- cost: end")[0]
    shares = [line.split("|")[5].strip() for line in written.splitlines() if line.startswith("| `")]
    assert len(shares) == 4 and all(float(share.removesuffix("%")) < 1 for share in shares)


# TensorBoard --------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    with mock.patch.dict(os.environ, TENSORBOARD_LOGGING_DIR=str(logs)):
        rows, _ = run(tmp_path / "run", telemetry=True, report_to=["tensorboard"])
    events = EventAccumulator(str(logs))
    events.Reload()
    for key in ("optim_update_ratio_group_0", "optim_step_seconds", "optim_coverage"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]


def test_accelerates_tracker_gets_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = torch.nn.Linear(4, 4)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, print_audit=False)
    observer = Observer(optimizer)
    with fresh_accelerate():
        accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
        accelerator.init_trackers("run")
        model(torch.ones(1, 4)).sum().backward()
        with observer.step():
            optimizer.step()
        accelerator.log(observer.latest, step=1)
        accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (event,) = events.Scalars("update_ratio_group_0")
    assert event.value == pytest.approx(observer.latest["update_ratio_group_0"], rel=1e-6)
