"""GreedyLR through the Trainer's door, with `compute_metrics` that ranks do not agree on; the stock Trainer's drift."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from test_schedulers_ranks import RATE, SKEWS, expected_trace
from trainers import STEPS, Job, train
from transformers.optimization import GreedyLR

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.integrations.transformers.mixin import DistOptimTrainerMixin
from dist_optim.integrations.transformers.schedules import decide_after_evaluation, scheduler_for_trainer
from dist_optim.reporting.files import DECISIONS
from dist_optim.schedulers import MetricScheduler
from dist_optim.testing import RankPool

OPTIONS = {"patience": 0, "factor": 0.5, "min_lr": 1e-4, "smooth": True, "window_size": 3}
FOLLOWING = {
    "lr_scheduler_type": "greedy",
    "lr_scheduler_kwargs": OPTIONS,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "score",
    "greater_is_better": False,
}


class Scores:
    """A `compute_metrics` that gives a skewed score; it notes what this rank gave."""

    def __init__(self, skew: str) -> None:
        self.skew, self.given = skew, list[Any]()

    def __call__(self, predictions: Any) -> dict[str, Any]:
        score = SKEWS[self.skew](len(self.given), dist.get_rank())
        self.given.append(score)
        return {} if score is None else {"score": float(score)}


def drop_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def train_by_scores(skew: str, strategy: str, directory: str, stock: bool = False) -> tuple[list[float], list[Any]]:
    """The rate of every step on this rank, and the scores that this rank gave."""
    scores = Scores(skew)
    options = {"compute_metrics": scores, "preprocess_logits_for_metrics": drop_logits}
    job = Job("adamw_torch", FOLLOWING, options=options)
    if stock:
        job = Job("adamw_torch", FOLLOWING, kind=transformers.Trainer, options=options)
        outcome = train(job, strategy, directory, transformers.TrainingArguments)
    else:
        outcome = train(job, strategy, directory)
    return outcome.all("learning_rate"), scores.given


@pytest.mark.filterwarnings("ignore:greedy takes no decision")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
@pytest.mark.parametrize(
    "skew", ["each rank its own value", "an unseeded bootstrap", "a score on rank 0 only", "NaN on one rank"]
)
def test_every_rank_trains_at_the_rates_of_one_process_fed_the_reduced_metric(
    skew: str, strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    (mine, given), (others, given_there) = two_ranks.run(train_by_scores, skew, strategy, str(tmp_path))
    decided = expected_trace([given, given_there])
    assert mine == others == [RATE, *decided][:STEPS]
    rows = [json.loads(line) for line in (tmp_path / DECISIONS).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["new_lr"][0] for row in rows] == decided
    assert len({*decided}) > 2, "the rate must move, or this tests little"


@pytest.mark.parametrize("skew", ["opposite trends", "NaN on one rank"])
def test_control_the_stock_trainers_ranks_drift_apart(skew: str, two_ranks: RankPool, tmp_path: Path) -> None:
    (mine, _), (others, _) = two_ranks.run(train_by_scores, skew, "ddp", str(tmp_path), stock=True)
    assert mine[0] == others[0] and mine != others


def resumed(strategy: str, directory: str) -> list[list[float]]:
    settings = {
        **FOLLOWING,
        "metric_for_best_model": "loss",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "min_lr": 1e-4, "cooldown": 1, "warmup": 1},
        "save_strategy": "steps",
        "save_steps": 3,
    }
    job = Job("adamw_torch", settings)
    straight = train(job, strategy, Path(directory) / "straight")
    train(job, strategy, Path(directory) / "cut")
    last = train(replace(job, resume=str(Path(directory) / "cut" / "checkpoint-3")), strategy, Path(directory) / "cut")
    return [straight.all("learning_rate"), last.all("learning_rate")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_a_resumed_run_takes_the_same_decisions(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    (straight, last), others = two_ranks.run(resumed, strategy, str(tmp_path))
    assert straight == last and [straight, last] == others and len(set(straight)) > 2
    assert (tmp_path / "cut" / DECISIONS).read_text() == (tmp_path / "straight" / DECISIONS).read_text()


def accuracy(value: float, predictions: Any) -> dict[str, float]:
    return {"accuracy": value}


def rates_by_rising_accuracy(directory: str) -> list[float]:
    rising = iter(range(1, 100))
    settings = {
        **{key: value for key, value in FOLLOWING.items() if key != "greater_is_better"},
        "metric_for_best_model": "accuracy",
    }
    options = {"compute_metrics": lambda predictions: accuracy(next(rising) / 100, predictions)}
    return train(Job("adamw_torch", settings, options=options), "ddp", directory).all("learning_rate")


def test_a_rising_accuracy_raises_the_rate(two_ranks: RankPool, tmp_path: Path) -> None:
    rates, others = two_ranks.run(rates_by_rising_accuracy, str(tmp_path))
    assert rates == others == sorted(rates) and rates[-1] > rates[0]


def message_of(settings: dict[str, Any], directory: str) -> str:
    try:
        train(Job("adamw_torch", {**FOLLOWING, **settings}), "ddp", directory)
    except (DistOptimError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval_strategy": "no"}, "eval strategy"),
        ({"metric_for_best_model": "bleu"}, "asks for 'eval_bleu', and evaluation gave: eval_loss"),
        ({"lr_scheduler_kwargs": {"patience": 0}, "learning_rate": 5e-5}, "below min_lr=0.001"),
        ({"lr_scheduler_kwargs": {**OPTIONS, "mode": "max"}}, "contradicts greater_is_better=False"),
        ({"warmup_steps": 3}, "warmup_steps=0"),
    ],
)
def test_what_could_not_decide_is_refused_on_all_ranks(
    settings: dict[str, Any], said: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    assert all(said in message for message in two_ranks.run(message_of, settings, str(tmp_path)))


def schedule_of(optimizer: torch.optim.Optimizer, directory: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(str(directory), report_to=[], use_cpu=True, **settings)
    return scheduler_for_trainer(arguments, optimizer, 10)


def test_the_warm_up_of_a_schedule_free_optimizer_is_its_own(tmp_path: Path) -> None:
    """The usual way to train it: a constant schedule, and warmup_steps for the optimizer."""
    model, settings = torch.nn.Linear(3, 3), {"lr_scheduler_type": "constant", "warmup_steps": 4}
    schedule_free = dist_optim.build_optimizer(model, "schedule_free_adamw", warmup_steps=4, print_audit=False)
    schedule_of(schedule_free, tmp_path, **settings)
    for other in ("adamw_torch", "schedule_free_radam"):
        optimizer = dist_optim.build_optimizer(torch.nn.Linear(3, 3), other, lr=RATE, print_audit=False)
        with pytest.raises(DistOptimError, match="constant_with_warmup"):
            schedule_of(optimizer, tmp_path, **settings)


def created(optimizer: torch.optim.Optimizer, given: Any, directory: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(str(directory), report_to=[], use_cpu=True, **settings)
    trainer: Any = SimpleNamespace(args=arguments, optimizer=optimizer, lr_scheduler=given)
    return DistOptimTrainerMixin.create_scheduler(trainer, 10)


def test_a_schedule_given_to_the_trainer_is_shared_where_it_follows_a_metric(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    by_steps, greedy = torch.optim.lr_scheduler.StepLR(optimizer, 3), GreedyLR(optimizer, min_lr=1e-4)
    assert created(optimizer, by_steps, tmp_path) is by_steps
    shared = created(optimizer, greedy, tmp_path, eval_strategy="epoch")
    assert isinstance(shared, MetricScheduler) and shared.scheduler is greedy
    assert created(optimizer, shared, tmp_path) is shared
    with pytest.raises(DistOptimError, match="Set eval_strategy"):
        created(optimizer, greedy, tmp_path)


def test_a_metric_that_improves_the_other_way_is_refused(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = dist_optim.build_scheduler(optimizer, "greedy", min_lr=1e-4)
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, metric_for_best_model="accuracy", greater_is_better=True
    )
    with pytest.raises(DistOptimError, match="contradicts greater_is_better=True"):
        decide_after_evaluation(schedule, {"eval_accuracy": 0.5}, arguments, 1)


def test_without_an_evaluation_strategy_the_error_names_it(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), **FOLLOWING, report_to=[], use_cpu=True)
    arguments.eval_strategy = "no"  # what an argument class without the Trainer's own check lets through
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    with pytest.raises(DistOptimError, match="Set eval_strategy"):
        scheduler_for_trainer(arguments, optimizer, 10)


OWN_SCORES = ((0.1, 0.4, 0.3, 0.5, 0.2, 0.6), (0.9, 0.8, 0.7, 0.6, 0.5, 0.4))


def saved_by_own_scores(directory: str) -> list[str]:
    given = iter(OWN_SCORES[dist.get_rank()])
    settings = {
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"},
        **{"metric_for_best_model": "score", "greater_is_better": True},
    }
    options = {
        "compute_metrics": lambda predictions: {"score": next(given)},
        "preprocess_logits_for_metrics": drop_logits,
    }
    train(Job("adamw_torch", settings, options=options), "ddp", directory)
    return sorted(path.name for path in Path(directory).glob("checkpoint-*"))


def test_ranks_save_together_when_each_has_a_best_model_of_its_own(two_ranks: RankPool, tmp_path: Path) -> None:
    """Rank 0's scores are best at steps 1, 2, 4 and 6, rank 1's at 1 alone: who saves alone waits for ever."""
    mine, others = two_ranks.run(saved_by_own_scores, str(tmp_path))
    assert mine == others == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-6"]
