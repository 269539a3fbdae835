"""`build_scheduler` in one process: upstream's arithmetic, what is refused, warm-up, ratios, state and the log."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from transformers.optimization import GreedyLR, get_scheduler
from transformers.trainer_utils import SchedulerType

import dist_optim
from dist_optim.errors import DistOptimError, MetricError, ScheduleError, StateDictError
from dist_optim.schedulers import MetricScheduler, schedule_names

STEPS = 20
OPTIONS: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 6, "min_lr_ratio": 0.1},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3, "warmup_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 5},
}
TORCH_CLASSES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [3, 9]},
    "CosineAnnealingLR": {"T_max": 9},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": STEPS + 1, "cycle_momentum": False},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "cycle_momentum": False},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9},
}
BY_STEPS = [name for name in schedule_names() if name not in ("greedy", "reduce_lr_on_plateau")]


def make_optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.SGD(groups, lr=0.1)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def trace(schedule: Any, steps: int = STEPS) -> list[list[float]]:
    found = [rates_of(schedule.optimizer)]
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
        found.append(rates_of(schedule.optimizer))
    return found


def build(name: str, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Any:
    return dist_optim.build_scheduler(make_optimizer() if optimizer is None else optimizer, name, **options)


def build_stepped(name: str, optimizer: torch.optim.Optimizer | None = None) -> Any:
    warmup = 0 if name == "constant" or name in TORCH_CLASSES else 4
    lengths = {} if name in TORCH_CLASSES else {"num_training_steps": STEPS, "num_warmup_steps": warmup}
    return build(name, optimizer, **lengths, **OPTIONS.get(name, TORCH_CLASSES.get(name, {})))


class TestNames:
    def test_every_schedule_of_transformers_has_its_name(self) -> None:
        assert schedule_names() == sorted(kind.value for kind in SchedulerType)

    @pytest.mark.parametrize("name", BY_STEPS)
    def test_a_name_gives_the_rates_of_transformers(self, name: str) -> None:
        stock = get_scheduler(name, make_optimizer(0.1, 0.02), 4, STEPS, scheduler_specific_kwargs=OPTIONS.get(name))
        assert trace(build_stepped(name, make_optimizer(0.1, 0.02))) == trace(stock)

    @pytest.mark.parametrize("name", TORCH_CLASSES)
    def test_a_torch_class_serves_as_a_name_and_as_a_class(self, name: str) -> None:
        torch_class = getattr(lr_scheduler, name)
        stock = torch_class(make_optimizer(), **TORCH_CLASSES[name])
        by_class = dist_optim.build_scheduler(make_optimizer(), torch_class, **TORCH_CLASSES[name])
        assert trace(build_stepped(name)) == trace(by_class) == trace(stock)
        assert type(by_class) is torch_class

    def test_an_instance_that_follows_the_step_count_stays_as_it_is(self) -> None:
        optimizer = make_optimizer()
        schedule = lr_scheduler.StepLR(optimizer, 3)
        assert dist_optim.build_scheduler(optimizer, schedule) is schedule

    @pytest.mark.parametrize("make", [lambda o: GreedyLR(o), lambda o: lr_scheduler.ReduceLROnPlateau(o)])
    def test_an_instance_that_follows_a_metric_is_shared(self, make: Any) -> None:
        optimizer = make_optimizer()
        schedule = make(optimizer)
        shared = dist_optim.build_scheduler(optimizer, schedule)
        assert isinstance(shared, MetricScheduler) and shared.scheduler is schedule
        assert dist_optim.build_scheduler(optimizer, shared) is shared

    def test_the_enumeration_of_transformers_serves_as_a_name(self) -> None:
        assert isinstance(build(SchedulerType.GREEDY), MetricScheduler)


class TestRefusals:
    @pytest.mark.parametrize(
        ("schedule", "options", "said"),
        [
            ("greddy", {}, "Did you mean greedy?"),
            ("SteplR", {"step_size": 3}, "Did you mean StepLR"),
            ("greedy", {"patince": 3}, "Did you mean patience?"),
            ("greedy", {"warmup_steps": 3}, "greedy has no option 'warmup_steps'"),
            ("greedy", {"factor": 1.5}, "Factor should be < 1.0"),
            ("linear", {}, "Pass num_training_steps"),
            ("constant_with_warmup", {"num_warmup_steps": 0.1}, "Pass num_training_steps"),
            ("linear", {"num_training_steps": 10, "num_warmup_steps": 1.5}, "neither a number of steps nor a share"),
            ("linear", {"num_training_steps": 10, "num_warmup_steps": -1}, "neither a number of steps nor a share"),
            ("greedy", {"num_warmup_steps": 5}, "no warm-up of the learning rate"),
            ("constant", {"num_warmup_steps": 5}, "constant_with_warmup"),
            ("linear", {"num_training_steps": 10, "greater_is_better": True}, "takes no decisions by a metric"),
            ("linear", {"num_training_steps": 10, "log_path": "x"}, "log_path would be ignored"),
            ("StepLR", {}, "StepLR needs step_size"),
            ("warmup_stable_decay", {"num_training_steps": 10}, "num_decay_steps"),
            ("greedy", {"min_lr": 0.2}, "min_lr=0.001"),
            ("greedy", {"max_lr": 0.01}, "max_lr=1"),
            ("greedy", {"eps": 0.5}, "Give eps=0"),
            ("reduce_lr_on_plateau", {"min_lr": 0.2}, "could never fall"),
            ("greedy", {"mode": "max", "greater_is_better": False}, "contradicts greater_is_better=False"),
            ("greedy", {"metric_from_rank": 1}, "there are 1 ranks"),
            ("greedy", {"on_nonfinite": "skip"}, "is not one of: ignore, raise"),
        ],
    )
    def test_what_cannot_work_is_refused_with_the_remedy(
        self, schedule: str, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(ScheduleError, match=re.escape(said)):
            build(schedule, **options)

    def test_the_default_min_lr_of_greedy_is_refused_where_rates_could_only_rise(self) -> None:
        with pytest.raises(ScheduleError, match=re.escape("below min_lr=0.001")) as refusal:
            build("greedy", make_optimizer(5e-5))
        remedy = re.search(r"for example min_lr=([\d.e-]+)", str(refusal.value))
        assert remedy is not None
        assert build("greedy", make_optimizer(5e-5), min_lr=float(remedy[1])).get_last_lr() == [5e-5]

    @pytest.mark.parametrize(
        ("make", "options", "said"),
        [
            (lambda o: lr_scheduler.StepLR(o, 3), {"gamma": 0.5}, "is built already"),
            (lambda o: lr_scheduler.StepLR(make_optimizer(), 3), {}, "another optimizer"),
            (lambda o: GreedyLR(o, min_lr=1.0), {}, "below min_lr=1"),
            (lambda o: GreedyLR(o, mode="max"), {"greater_is_better": False}, "contradicts"),
            (lambda o: o, {}, "is no schedule"),
            (lambda o: 3, {}, "is no schedule"),
        ],
    )
    def test_an_instance_that_cannot_work_is_refused(self, make: Any, options: dict[str, Any], said: str) -> None:
        optimizer = make_optimizer()
        with pytest.raises(ScheduleError, match=said):
            dist_optim.build_scheduler(optimizer, make(optimizer), **options)

    def test_a_metric_schedule_stepped_without_a_metric_says_where_to_call_it(self) -> None:
        with pytest.raises(ScheduleError, match=re.escape("Call step(metric) after each evaluation")):
            build("greedy").step()
        engines = build("greedy", stepped_by_engine=True)
        engines.step()
        assert engines.decisions == []

    @pytest.mark.parametrize("metric", ["0.5", (1.0, 2.0, 3.0), torch.ones(2), (1.0, -1.0), (1.0, math.nan), 1j])
    def test_what_is_no_metric_is_refused(self, metric: Any) -> None:
        with pytest.raises(MetricError):
            build("greedy").step(metric)

    def test_no_metric_at_all_is_refused(self) -> None:
        schedule = build("greedy")
        for nothing in (None, (0.0, 0)):
            with pytest.raises(MetricError, match="No rank gave a metric"):
                schedule.step(nothing)


class TestLengths:
    @pytest.mark.parametrize(("share", "steps"), [(0.1, 3), (0.25, 6), (0.99, 24)])
    def test_a_share_is_rounded_up_as_the_trainer_rounds(self, share: float, steps: int) -> None:
        lengths: dict[str, Any] = {"num_training_steps": 24}
        by_share = build("linear", num_warmup_steps=share, **lengths)
        assert trace(by_share) == trace(build("linear", num_warmup_steps=steps, **lengths))

    def test_a_schedule_that_needs_no_length_ignores_that_of_the_training(self) -> None:
        assert trace(build("StepLR", step_size=3, num_training_steps=24)) == trace(build("StepLR", step_size=3))


def sequences(count: int) -> list[tuple[dict[str, Any], list[float], list[float]]]:
    """Random options, rates and metrics: plateaus, noise, repeats and jumps, long enough to reach floors and resets."""
    drawn = []
    for seed in range(count):
        chance = random.Random(seed)
        options = {
            "mode": chance.choice(["min", "max"]),
            "factor": chance.choice([0.5, 0.9, 0.95]),
            "patience": chance.randrange(4),
            "threshold": chance.choice([1e-6, 0.1]),
            "threshold_mode": chance.choice(["abs", "rel"]),
            "cooldown": chance.randrange(3),
            "warmup": chance.randrange(3),
            "min_lr": chance.choice([0.0, 1e-3, 0.04]),
            "max_lr": chance.choice([0.15, 1.0]),
            "smooth": chance.random() < 0.5,
            "window_size": chance.choice([2, 7]),
            "reset_start": chance.choice([1, 3, 500]),
        }
        level, metrics = 3.0, []
        for _ in range(120):
            level += chance.choice([0.0, 0.0, -0.3, -0.05, 0.05, 0.3, chance.gauss(0, 0.5)])
            metrics.append(level)
        drawn.append((options, [0.1] if chance.random() < 0.5 else [0.1, 0.1], metrics))
    return drawn


class TestDecisions:
    def test_greedy_decides_as_that_of_transformers_does_step_for_step(self) -> None:
        decisions = set()
        for options, rates, metrics in sequences(150):
            stock = GreedyLR(make_optimizer(*rates), **options)
            ours = build("greedy", make_optimizer(*rates), **options)
            for number, metric in enumerate(metrics):
                stock.step(metric)
                ours.step(metric)
                assert rates_of(ours.optimizer) == rates_of(stock.optimizer), (options, number)
                assert ours.scheduler.state_dict() == stock.state_dict(), (options, number)
            decisions |= {row["decision"] for row in ours.decisions}
        assert decisions == {"raised", "lowered", "kept", "reset"}

    def test_plateau_decides_as_that_of_torch_does_step_for_step(self) -> None:
        for options, rates, metrics in sequences(40):
            own = {key: options[key] for key in ("mode", "factor", "patience", "threshold", "cooldown", "min_lr")}
            stock = lr_scheduler.ReduceLROnPlateau(make_optimizer(*rates), **own)
            ours = build("reduce_lr_on_plateau", make_optimizer(*rates), **own)
            for metric in metrics:
                stock.step(metric)
                ours.step(torch.tensor(metric, dtype=torch.float64))
                assert rates_of(ours.optimizer) == rates_of(stock.optimizer), options

    @pytest.mark.parametrize(("greater_is_better", "mode"), [(True, "max"), (False, "min"), (None, "min")])
    def test_mode_follows_the_direction_of_the_metric(self, greater_is_better: bool | None, mode: str) -> None:
        schedule = build("greedy", greater_is_better=greater_is_better, patience=0)
        assert schedule.scheduler.mode == mode
        for accuracy in (0.5, 0.6, 0.7):
            schedule.step(accuracy)
        assert (schedule.get_last_lr()[0] > 0.1) == (mode == "max")

    def test_nan_is_refused_where_that_is_asked_for(self) -> None:
        with pytest.raises(MetricError, match="not finite on ranks"):
            build("greedy", on_nonfinite="raise").step(math.inf)

    def test_tensor_rates_keep_their_identity(self) -> None:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1), capturable=False)
        held = optimizer.param_groups[0]["lr"]
        schedule = build("reduce_lr_on_plateau", optimizer, patience=0, factor=0.5)
        for metric in (1.0, 2.0):
            schedule.step(metric)
        assert optimizer.param_groups[0]["lr"] is held and float(held) == pytest.approx(0.05)


def test_a_nan_leaves_no_trace_in_the_running_mean() -> None:
    options: dict[str, Any] = {"patience": 0, "smooth": True, "window_size": 3}
    clean, poisoned = build("greedy", **options), build("greedy", **options)
    stock = GreedyLR(make_optimizer(), **options)
    for metric in (3.0, 2.0, 1.5):
        clean.step(metric), poisoned.step(metric), stock.step(metric)
    with pytest.warns(UserWarning, match="takes no decision"):
        poisoned.step(math.nan)
    stock.step(math.nan)
    for metric in (1.2, 1.0, 0.9, 0.8, 0.7):
        clean.step(metric), poisoned.step(metric), stock.step(metric)
    assert poisoned.get_last_lr() == clean.get_last_lr()
    assert poisoned.scheduler.state_dict() == clean.scheduler.state_dict()
    assert poisoned.decisions[3]["decision"] == "skipped" and poisoned.decisions[3]["metric"] is None
    assert rates_of(stock.optimizer) < clean.get_last_lr(), "upstream alone is poisoned, or this tests nothing"


def test_groups_keep_their_ratios_at_the_bounds_too() -> None:
    schedule = build("greedy", make_optimizer(0.1, 0.01, 1e-5), patience=0, factor=0.5, min_lr=0.02, max_lr=0.5)
    seen = set()
    for metric in (3, 2, 1, 0, 4, 5, 6, 7, 8, 9):
        schedule.step(metric)
        first, second, third = schedule.get_last_lr()
        assert second == pytest.approx(first / 10, rel=1e-12) and third == pytest.approx(first / 1e4, rel=1e-12)
        seen.add(first)
    assert {0.5, 0.02} <= seen
    stock = GreedyLR(make_optimizer(0.1, 0.01), patience=0, factor=0.5, min_lr=0.005, max_lr=0.5)
    for metric in (1, 4, 5, 6, 7, 8, 9):
        stock.step(metric)
    assert rates_of(stock.optimizer) == [0.005, 0.005], "upstream alone loses the ratio, or this tests nothing"


class TestState:
    @pytest.mark.parametrize("name", [*BY_STEPS, *TORCH_CLASSES])
    def test_a_schedule_by_steps_resumes_exactly(self, name: str, tmp_path: Path) -> None:
        straight = build_stepped(name)
        expected = trace(straight)
        first = build_stepped(name)
        trace(first, 7)
        torch.save([first.optimizer.state_dict(), first.state_dict()], tmp_path / "state.pt")
        second = build_stepped(name)
        optimizer_state, state = torch.load(tmp_path / "state.pt", weights_only=True)
        second.optimizer.load_state_dict(optimizer_state)
        second.load_state_dict(state)
        assert trace(second, STEPS - 7) == expected[7:]

    def test_a_greedy_run_resumes_exactly_wherever_it_was_cut(self, tmp_path: Path) -> None:
        for options, rates, metrics in sequences(12):
            cut = random.Random(str(options)).randrange(1, len(metrics))
            straight = build("greedy", make_optimizer(*rates), log_path=tmp_path / "straight.jsonl", **options)
            first = build("greedy", make_optimizer(*rates), log_path=tmp_path / "cut.jsonl", **options)
            for number, metric in enumerate(metrics):
                straight.step(metric, at_step=number)
                if number < cut:
                    first.step(metric, at_step=number)
            torch.save(first.state_dict(), tmp_path / "state.pt")
            first.step(metrics[cut], at_step=cut)  # decided after the checkpoint, and lost with the run
            second = build("greedy", make_optimizer(*rates), log_path=tmp_path / "cut.jsonl")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for number, metric in enumerate(metrics[cut:], cut):
                second.step(metric, at_step=number)
            assert second.state_dict() == straight.state_dict()
            assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "straight.jsonl").read_text()

    def test_the_state_shares_nothing_with_the_running_schedule(self) -> None:
        schedule = build("greedy", smooth=True, patience=0)
        schedule.step(1.0)
        state = schedule.state_dict()
        before = json.dumps(state)
        for metric in (0.5, 2.0, 3.0):
            schedule.step(metric)
        assert json.dumps(state) == before

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda state: state.pop("upstream"), "was not saved by this scheduler"),
            (lambda state: state.update(schedule="reduce_lr_on_plateau"), "'reduce_lr_on_plateau'"),
            (lambda state: state.update(learning_rates=[0.1, 0.1]), "2 learning rates"),
        ],
    )
    def test_a_foreign_state_is_refused(self, change: Any, said: str) -> None:
        schedule = build("greedy")
        state = schedule.state_dict()
        change(state)
        with pytest.raises(StateDictError, match=said):
            schedule.load_state_dict(state)


class TestLog:
    def test_a_line_holds_the_whole_decision(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "lr_decisions.jsonl"
        schedule = build("greedy", log_path=path, patience=0, factor=0.5)
        schedule.step((6.0, 2), at_step=40)
        schedule.step(4.0, at_step=80)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows == schedule.decisions
        assert rows[0] == {
            "number": 1,
            "step": 40,
            "metric": 3.0,
            "spread": {"min": 3.0, "max": 3.0, "ranks": 1},
            "ignored_ranks": [],
            "decision": "raised",
            "old_lr": [0.1],
            "new_lr": [0.2],
        }
        assert (rows[1]["decision"], rows[1]["new_lr"]) == ("lowered", [0.1])

    def test_a_new_run_replaces_the_log_of_an_earlier_one(self, tmp_path: Path) -> None:
        path = tmp_path / "lr_decisions.jsonl"
        for metric in (1.0, 2.0):
            build("greedy", log_path=path).step(metric)
        assert [json.loads(line)["metric"] for line in path.read_text().splitlines()] == [2.0]

    def test_a_log_that_cannot_be_written_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ScheduleError, match="cannot be written"):
            build("greedy", log_path=tmp_path / "file" / "log.jsonl").step(1.0)


class TestScheduleFree:
    def build(self, schedule: str, optimizer: str = "schedule_free_adamw") -> list[str]:
        built = dist_optim.build_optimizer(torch.nn.Linear(3, 3), optimizer, lr=0.1, print_audit=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dist_optim.build_scheduler(built, schedule, num_training_steps=10)
        return [str(one.message) for one in caught if "constant learning rate" in str(one.message)]

    def test_a_schedule_on_top_is_pointed_out_once(self) -> None:
        assert len(self.build("linear")) == 1

    def test_a_constant_rate_is_not(self) -> None:
        assert self.build("constant") == self.build("linear", "adamw_torch") == []


def test_the_errors_are_values_of_the_wrong_kind() -> None:
    assert issubclass(ScheduleError, ValueError) and issubclass(MetricError, DistOptimError)
