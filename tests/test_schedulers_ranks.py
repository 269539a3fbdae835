"""Metric schedules on ranks that do not see the same: one decision, or one refusal, on all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerated import Training, make_model, started_by_accelerate
from end_to_end import batch
from placements import full_parameters, place
from torch import nn
from transformers.optimization import GreedyLR
from zero import ZeroRun, engine_of, loss_of, parts_of, weights_of

import dist_optim
from dist_optim.errors import DistOptimError, MetricError, RanksDisagreeError, ScheduleError
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.deepspeed.schedules import feeds_wrong_metric
from dist_optim.testing import RankPool

STEPS = 10
GREEDY: dict[str, Any] = {"patience": 0, "factor": 0.5, "min_lr": 1e-4, "smooth": True, "window_size": 3}
RATE = 1e-2
ENGINES = ["ddp", "fsdp2", "zero2"]


def level(step: int) -> float:
    return (3.0, 2.0, 1.0, 5.0, 6.0, 0.5, 0.1, 7.0, 0.3, 0.2)[step]


def bootstrap(step: int) -> float:
    """A score of a sample that no seed decides."""
    chance = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "little"))
    return level(step) + 0.4 * torch.rand((), generator=chance).item()


SKEWS: dict[str, Callable[[int, int], Any]] = {
    "each rank its own value": lambda step, rank: torch.tensor(level(step) * (1 + 0.37 * rank)),
    "opposite trends": lambda step, rank: level(step) if rank == 0 else 2 * level(2) - level(step) / 8,
    "an unseeded bootstrap": lambda step, rank: bootstrap(step),
    "a score on rank 0 only": lambda step, rank: level(step) if rank == 0 else None,
    "NaN on one rank": lambda step, rank: math.nan if rank == 1 else level(step),
    "infinity on one rank, now and then": lambda step, rank: math.inf if rank == step % 2 else level(step) + rank,
    "NaN on all ranks, once": lambda step, rank: math.nan if step == 4 else level(step),
    "different sample counts": lambda step, rank: (torch.tensor(level(step) * (3 + 4 * rank) + rank), 3 + 4 * rank),
}


def mean_over_ranks(given: list[Any]) -> float | None:
    """The reduced metric, worked out once more: ranks that have something finite, weighed by their counts."""
    pairs = [one if isinstance(one, tuple) else (one, 1) for one in given if one is not None]
    finite = [(Fraction(float(total)), count) for total, count in pairs if math.isfinite(float(total))]
    return float(sum(total for total, _ in finite) / sum(count for _, count in finite)) if finite else None


def expected_trace(given_by_rank: list[list[Any]]) -> list[float]:
    """One process with transformers' GreedyLR, fed the reduced metric."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    stock, rates = GreedyLR(optimizer, **GREEDY), []
    for given in zip(*given_by_rank, strict=True):
        metric = mean_over_ranks(list(given))
        if metric is not None:
            stock.step(metric)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def plain_loop(engine: str) -> tuple[Any, Callable[[int], None], Callable[[], list[torch.Tensor]]]:
    """A schedule on a placed model, what takes a training step, and the model's weights."""
    if engine.startswith("zero"):
        stage = int(engine[-1])
        scheduler = {"type": "greedy", "params": GREEDY}
        run = ZeroRun("adafactor", {"lr": RATE}, stage, config={"scheduler": scheduler}, real_batches=True)
        driven = engine_of(run)

        def step_engine(step: int) -> None:
            (part,) = parts_of(run, step)
            driven.backward(loss_of(driven, part, step))
            driven.step()
            for inner in driven.basic_optimizer.parts():  # what upstream stepped with, not only what DeepSpeed shows
                assert [group["lr"] for group in inner.param_groups] == driven.lr_scheduler.get_last_lr()

        return driven.lr_scheduler, step_engine, lambda: weights_of(driven, run)
    model = place(make_model(Training("adafactor", {})), engine)
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=RATE, print_audit=False)

    def step_loop(step: int) -> None:
        part = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    schedule = dist_optim.build_scheduler(optimizer, "greedy", **GREEDY)
    return schedule, step_loop, lambda: list(full_parameters(model).values())


def train_with(engine: str, skew: str, log_path: str) -> tuple[list[float], list[Any], float, list[Any]]:
    """The rates after each decision, what this rank gave, a sum over all weights, and the decisions."""
    schedule, take_step, weights = plain_loop(engine)
    if dist.get_rank() == 0:
        schedule._log.path = Path(log_path)
    rates, given = [], []
    for step in range(STEPS):
        take_step(step)
        metric = SKEWS[skew](step, dist.get_rank())
        schedule.step(metric)
        given.append(metric)
        rates.append(schedule.get_last_lr()[0])
    return rates, given, sum(weight.double().sum().item() for weight in weights()), schedule.decisions


@pytest.mark.filterwarnings("ignore:greedy takes no decision")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("skew", SKEWS)
def test_rates_are_those_of_one_process_fed_the_reduced_metric(
    skew: str, engine: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    results = two_ranks.run(train_with, engine, skew, str(tmp_path / "log.jsonl"))
    traces, given, weights, decisions = map(list, zip(*results, strict=True))
    assert traces[0] == traces[1] == expected_trace(given)
    assert min(traces[0]) < RATE < max(traces[0]), "rises and falls, or this tests little"
    assert weights[0] == weights[1]
    assert decisions[0] == decisions[1]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == STEPS


def drift_of_upstream(skew: str) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    stock, rates = GreedyLR(optimizer, **GREEDY), []
    for step in range(STEPS):
        stock.step(float(SKEWS[skew](step, dist.get_rank())))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("skew", ["opposite trends", "NaN on one rank"])
def test_control_upstream_alone_on_each_rank_drifts(skew: str, two_ranks: RankPool) -> None:
    mine, other = two_ranks.run(drift_of_upstream, skew)
    assert mine != other


def disobey() -> str:
    """A rank that does not take over what was decided."""
    schedule: Any = dist_optim.build_scheduler(optimizer_alone(), "greedy", **GREEDY)
    with mock.patch("dist_optim.schedulers.shared.set_learning_rates"), mock.patch.object(GreedyLR, "load_state_dict"):
        try:
            schedule.step(1.0)
        except RanksDisagreeError as error:
            return str(error)
    return ""


def test_control_a_rank_that_does_not_obey_is_noticed(two_ranks: RankPool) -> None:
    said = "After decision 1 of greedy, learning rates differ between ranks: the rate of param group 0 is 0.02 on"
    assert all(said in message for message in two_ranks.run(disobey))


def optimizer_alone(rate: float = RATE) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def outcome_of(case: str) -> tuple[str, str, float]:
    """What a rank that goes wrong, and the ranks beside it, get: an error each, and rates as they were."""
    rank = dist.get_rank()
    schedule: Any = dist_optim.build_scheduler(
        optimizer_alone(),
        "greedy",
        on_nonfinite="raise" if case == "NaN refused" else "ignore",
        metric_from_rank=0 if case.startswith("from rank") else None,
        **GREEDY,
    )
    try:
        if case == "forgot the metric" and rank == 1:
            schedule.step()
        elif case == "log cannot be written":
            schedule._log.path = Path("/dev/null/log") if rank == 0 else None
            schedule.step(1.0)
        else:
            if case == "rates parted before":
                schedule.optimizer.param_groups[0]["lr"] = RATE * (1 + rank)
            if case == "upstream fails":
                schedule.scheduler.step = lambda metric: 1 / 0
            metrics: Any = {
                "nothing anywhere": None,
                "no number": "good" if rank == 1 else 1.0,
                "pairs on some": (3.0, 2) if rank == 1 else 1.0,
                "NaN refused": math.nan if rank == 1 else 1.0,
                "from rank 0, which has none": None if rank == 0 else 1.0,
            }.get(case, 1.0)
            schedule.step(metrics)
    except DistOptimError as error:
        return type(error).__name__, str(error), schedule.get_last_lr()[0]
    return "", "", schedule.get_last_lr()[0]


@pytest.mark.parametrize(
    ("case", "kind", "said"),
    [
        ("nothing anywhere", MetricError, "No rank gave a metric"),
        ("no number", MetricError, "A metric is a number"),
        ("pairs on some", MetricError, "pairs on all ranks"),
        ("NaN refused", MetricError, "not finite on ranks [1]"),
        ("from rank 0, which has none", MetricError, "metric_from_rank=0, and that rank gave no metric"),
        ("forgot the metric", ScheduleError, "step() was called without one"),
        ("rates parted before", RanksDisagreeError, "rank 1 is at decision 1 with [0.02]"),
        ("upstream fails", ScheduleError, "ZeroDivisionError"),
        ("log cannot be written", ScheduleError, "cannot be written"),
    ],
)
def test_ranks_refuse_together(case: str, kind: type, said: str, two_ranks: RankPool) -> None:
    outcomes = two_ranks.run(outcome_of, case)
    for error, text, _ in outcomes:
        assert error == kind.__name__ and said in text
    if case == "no number":
        assert outcomes[0][1].startswith("[from rank 1]")


def metric_of_rank_1() -> list[float]:
    schedule: Any = dist_optim.build_scheduler(optimizer_alone(), "greedy", metric_from_rank=1, **GREEDY)
    for step in range(STEPS):
        schedule.step(level(step) if dist.get_rank() == 1 else 100 - level(step))
    assert schedule.decisions[0]["spread"] == {"min": 3.0, "max": 97.0, "ranks": 2}
    return schedule.get_last_lr()


def test_the_metric_may_be_taken_from_one_rank(two_ranks: RankPool) -> None:
    expected = expected_trace([[level(step) for step in range(STEPS)]])[-1]
    assert two_ranks.run(metric_of_rank_1) == [[expected]] * 2


def resume(state: dict[str, Any] | None, engine: str, steps: list[int]) -> tuple[dict[str, Any], list[float]]:
    schedule, take_step, _ = plain_loop(engine)
    if state is not None:
        schedule.load_state_dict(state)
    rates = []
    for step in steps:
        take_step(step)
        schedule.step((level(step) * (1 + dist.get_rank()), 1 + dist.get_rank()), at_step=step)
        rates.append(schedule.get_last_lr()[0])
    return schedule.state_dict(), rates


def test_a_state_goes_on_under_another_engine_and_world_size(
    two_ranks: RankPool, three_ranks: RankPool, tmp_path: Path
) -> None:
    (first, before), other = two_ranks.run(resume, None, "ddp", list(range(4)))
    assert first == other[0]
    torch.save(first, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    (_, after), *_ = three_ranks.run(resume, state, "fsdp2", list(range(4, STEPS)))
    (_, under_zero), *_ = two_ranks.run(resume, state, "zero3", list(range(4, STEPS)))
    assert before + after == expected_trace([[level(step) for step in range(STEPS)]])
    assert under_zero == after


FUSED: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adalomo": {},
    "galore_adamw_layerwise": {"target_modules": ["attn"], "rank": 4, "update_proj_gap": 3},
}


def weights_of_loop(name: str, schedule: str, is_fused: bool) -> list[torch.Tensor]:
    """A loop whose rate changes between every two steps, with updates inside backward or after it."""
    model = place(make_model(Training(name, {})), "ddp")
    chosen = name if is_fused else name.removesuffix("_layerwise")
    optimizer = dist_optim.build_optimizer(
        model, chosen, lr=RATE, fused_backward=is_fused, print_audit=False, **FUSED[name]
    )
    options = GREEDY if schedule == "greedy" else {"num_training_steps": STEPS, "num_warmup_steps": 0.2}
    shared: Any = dist_optim.build_scheduler(optimizer, schedule, **options)
    for step in range(STEPS):
        part = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shared.step(*([level(step) + dist.get_rank()] if schedule == "greedy" else []))
    return list(full_parameters(model).values())


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("schedule", ["greedy", "linear"])
def test_updates_inside_backward_take_the_rate_of_their_step(name: str, schedule: str, two_ranks: RankPool) -> None:
    after, *_ = two_ranks.run(weights_of_loop, name, schedule, False)
    inside, *_ = two_ranks.run(weights_of_loop, name, schedule, True)
    assert all(torch.equal(one, other) for one, other in zip(after, inside, strict=True))


def rates_of_json(section: dict[str, Any], stage: int, fp16: dict[str, Any] | None = None) -> tuple[list[float], int]:
    config = {"scheduler": section, **({} if fp16 is None else {"fp16": fp16})}
    run = ZeroRun("adamw_torch", {"lr": RATE}, stage, config=config, real_batches=True)
    engine, rates = engine_of(run), []
    for step in range(4):
        (part,) = parts_of(run, step)
        engine.backward(loss_of(engine, part, step))
        engine.step()
        rates.append(engine.basic_optimizer.param_groups[0]["lr"])
    return rates, engine.skipped_steps


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("section", "shares"),
    [
        ({"type": "linear", "params": {"num_training_steps": 4}}, (0.75, 0.5, 0.25, 0)),
        ({"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}}, (1, 0.5, 0.5, 0.25)),
    ],
    ids=["linear", "StepLR"],
)
def test_deepspeeds_json_takes_the_names_of_schedules(
    section: dict[str, Any], shares: tuple[float, ...], stage: int, two_ranks: RankPool
) -> None:
    expected = [pytest.approx(RATE * share) for share in shares]
    assert two_ranks.run(rates_of_json, section, stage) == [(expected, 0)] * 2


def test_a_step_that_fp16_skipped_does_not_advance_the_schedule(two_ranks: RankPool) -> None:
    section = {"type": "linear", "params": {"num_training_steps": 4}}
    fp16 = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    (rates, skipped), other = two_ranks.run(rates_of_json, section, 2, fp16)
    assert (rates, skipped) == other and skipped > 0
    assert rates[-1] == pytest.approx(RATE * skipped / 4)


def loop_of_accelerate(scheduler: Any, options: dict[str, Any] | None, accumulation: int) -> list[float]:
    training = Training("adamw_torch", {"lr": RATE}, accumulation=accumulation)
    with started_by_accelerate("ddp", training) as accelerator:
        model, optimizer, schedule = prepare(
            accelerator,
            make_model(training),
            "adamw_torch",
            lr=RATE,
            scheduler=scheduler,
            scheduler_options=options,
            print_audit=False,
        )
        assert schedule is not None and accelerator._schedulers == [schedule]
        rates = []
        for step in range(4):
            part = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
            for _ in range(accumulation):
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=part, labels=part).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    if not isinstance(schedule, dist_optim.MetricScheduler):
                        schedule.step()
            if isinstance(schedule, dist_optim.MetricScheduler):
                assert accelerator.prepare(schedule) is schedule
                schedule.step(float(level(step) + dist.get_rank()))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerates_loop_steps_once_a_call_and_loses_no_metric(accumulation: int, two_ranks: RankPool) -> None:
    by_steps = two_ranks.run(loop_of_accelerate, "linear", {"num_training_steps": 4}, accumulation)
    assert by_steps == [[pytest.approx(RATE * left / 4) for left in (3, 2, 1, 0)]] * 2
    by_metric = two_ranks.run(loop_of_accelerate, "greedy", GREEDY, accumulation)
    assert by_metric == [expected_trace([[level(step) + 0.5 for step in range(4)]])] * 2


def options_without_a_schedule() -> str:
    try:
        loop_of_accelerate(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), {"gamma": 0.5}, 1)
    except ScheduleError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("make", [GreedyLR, torch.optim.lr_scheduler.ReduceLROnPlateau])
def test_an_engine_is_known_to_feed_upstreams_metric_schedules_the_batch_size(make: Any) -> None:
    optimizer = optimizer_alone()
    assert feeds_wrong_metric(SimpleNamespace(lr_scheduler=make(optimizer)))
    for harmless in (dist_optim.build_scheduler(optimizer, make(optimizer)), None):
        assert not feeds_wrong_metric(SimpleNamespace(lr_scheduler=harmless))


def test_options_that_would_reach_no_schedule_are_refused(two_ranks: RankPool) -> None:
    assert all("would reach no schedule" in said for said in two_ranks.run(options_without_a_schedule))
