"""What else comes through the Trainer: a decision that follows a metric, DeepSpeed's JSON, LOMO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from trainers import ZERO, Job, gap_between, train

from dist_optim.errors import UnsupportedError
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

GREEDY = {
    "lr_scheduler_type": "greedy",
    "lr_scheduler_kwargs": {"patience": 0, "min_lr": 1e-5, "factor": 0.5},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "score",
    "greater_is_better": False,
}


def score_of_a_rank(prediction: Any) -> dict[str, float]:
    """Rises on one rank and falls on the other: each, left to itself, would set another rate."""
    score_of_a_rank.calls += 1  # type: ignore[attr-defined]
    return {"score": score_of_a_rank.calls * (1.0 if dist.get_rank() == 0 else -2.0)}  # type: ignore[attr-defined]


def one_rate_on_all_ranks(directory: str) -> None:
    problems = []
    for strategy in ("ddp", "fsdp2"):
        score_of_a_rank.calls = 0  # type: ignore[attr-defined]
        job = Job("adamw_torch", GREEDY, options={"compute_metrics": score_of_a_rank})
        rates = train(job, strategy, Path(directory) / strategy).all("learning_rate")
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, rates)
        if gathered[0] != gathered[1] or len(set(rates)) < 2:
            problems.append(f"{strategy}: rates {gathered}")
    assert_no_problems_on_any_rank(problems)


def test_a_metric_of_one_ranks_own_sets_one_rate_for_all(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(one_rate_on_all_ranks, str(tmp_path))


def json_equals_arguments(directory: str) -> None:
    hyperparameters = {"rank": 8, "update_proj_gap": 3, "target_modules": ["attn", "mlp"]}
    section = {"type": "galore_adamw", "params": {"lr": "auto", "weight_decay": "auto", **hyperparameters}}
    settings = {"optim": "adamw_torch_fused", "optim_args": None, "optim_target_modules": None}
    config = {**ZERO, "zero_optimization": {"stage": 2}, "optimizer": section}
    named = Job("galore_adamw", {**settings, "save_strategy": "steps", "save_steps": 3})
    by_json = train(named, "zero2", Path(directory) / "json", deepspeed=config)
    by_name = train(Job("galore_adamw"), "zero2", Path(directory) / "name")
    assert gap_between(by_json, by_name) == 0
    resumed = replace(named, resume=str(Path(directory) / "json" / "checkpoint-3"))
    assert gap_between(train(resumed, "zero2", Path(directory) / "again", deepspeed=config), by_name) == 0


def test_deepspeeds_json_names_the_optimizer(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(json_equals_arguments, str(tmp_path))


def lomo_obeys(directory: str) -> None:
    """sgd without momentum is LOMO's update: clipped by the same norm, it goes the same way."""
    problems = []
    clipped = {"max_grad_norm": 0.5, "learning_rate": 0.1}
    for number, (strategy, settings) in enumerate(
        [
            ("ddp", clipped),
            ("fsdp1", clipped),
            ("fsdp2", clipped),
            ("fsdp2", {**clipped, "gradient_accumulation_steps": 2}),
            ("ddp", {**clipped, "max_grad_norm": 0.0}),
        ]
    ):
        lomo = train(Job("lomo", settings), strategy, Path(directory) / f"lomo-{number}")
        sgd = train(Job("sgd", settings), strategy, Path(directory) / f"sgd-{number}")
        norms = [abs(one - other) for one, other in zip(lomo.all("grad_norm"), sgd.all("grad_norm"), strict=False)]
        is_logged = len(norms) == 6 or not settings["max_grad_norm"]
        if gap_between(lomo, sgd) > 1e-6 or not is_logged or max(norms, default=0) > 1e-5:
            problems.append(f"{strategy} {settings}: {gap_between(lomo, sgd)}, norms {norms}")
        if lomo.all("grad_norm") and min(lomo.all("grad_norm")) < 0.5:
            problems.append(f"{strategy} {settings}: {lomo.all('grad_norm')} were clipped before they were logged")
    assert_no_problems_on_any_rank(problems)


def test_lomo_obeys_clipping_and_accumulation(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(lomo_obeys, str(tmp_path))


def test_layerwise_names_refuse_to_accumulate(tmp_path: Path) -> None:
    settings = {"optim_target_modules": ["attn", "mlp"], "gradient_accumulation_steps": 2}
    with pytest.raises(UnsupportedError, match="gradient_accumulation_steps=1 .* or use galore_adamw"):
        train(Job("galore_adamw_layerwise", settings), "alone", tmp_path)


CLIPPED = {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=8, update_proj_gap=3", "max_grad_norm": 0.5}


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "apollo_adamw"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_layerwise_name_is_the_plain_one(name: str, max_grad_norm: float, tmp_path: Path) -> None:
    settings = {**CLIPPED, "max_grad_norm": max_grad_norm, "lr_scheduler_type": "cosine"}
    layerwise = train(Job(f"{name}_layerwise", settings), "alone", tmp_path / "layerwise")
    plain = train(Job(name, settings), "alone", tmp_path / "plain")
    assert gap_between(layerwise, plain) == 0
    assert layerwise.all("learning_rate") == plain.all("learning_rate")
    if max_grad_norm:
        assert layerwise.all("grad_norm") == plain.all("grad_norm") and min(plain.all("grad_norm")) > max_grad_norm


def layerwise_clips(directory: str) -> None:
    plain = train(Job("galore_adamw", CLIPPED), "fsdp2", Path(directory) / "plain")
    for strategy in ("ddp", "fsdp2"):
        layerwise = train(Job("galore_adamw_layerwise", CLIPPED), strategy, Path(directory) / strategy)
        assert gap_between(layerwise, plain) < 1e-6, strategy


def test_layerwise_names_clip_on_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(layerwise_clips, str(tmp_path))
