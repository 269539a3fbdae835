"""The Trainer under every strategy, against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerated import Training, alone
from end_to_end import make_llama
from trainers import SETTINGS, Job, train

from dist_optim.specs.hyperparameters import parse_optim_args
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank, relative_distance

JOBS = {
    "galore, clipped, accumulated": Job("galore_adamw", {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}),
    "galore, clipped, on four ranks": Job("galore_adamw", {"max_grad_norm": 0.5}),
    "schedule-free, evaluated": Job("schedule_free_adamw", {"eval_strategy": "steps", "eval_steps": 2}),
}


def reference_of(job: Job) -> Training:
    """The same job for `accelerated.alone`."""
    settings = {**SETTINGS.get(job.name, {}), **job.settings}
    options = {"lr": 1e-2, **parse_optim_args(settings.get("optim_args"))}
    if "optim_target_modules" in settings:
        options["target_modules"] = settings["optim_target_modules"]
    return Training(
        job.name,
        options,
        clip=settings.get("max_grad_norm"),
        accumulation=settings.get("gradient_accumulation_steps", 1),
        evaluate_every=settings.get("eval_steps"),
    )


def is_within_the_floor(name: str, strategies: list[str], directory: str) -> None:
    job = JOBS[name]
    names = [fqn for fqn, _ in make_llama().named_parameters()]
    start = [p.detach() for p in make_llama().parameters()]
    training = replace(reference_of(job), steps=6)
    reference = alone(training)
    floor = max(relative_distance(alone(training, parts).weights, reference.weights, start) for parts in (2, 3, 6))
    problems = []
    for strategy in strategies:
        found = train(job, strategy, Path(directory) / strategy)
        distance = relative_distance([found.weights[fqn] for fqn in names], reference.weights, start)
        if not 0 < floor < 1e-3 or distance > 2 * floor:
            problems.append(f"{strategy}: {distance:.2e}, floor {floor:.2e}")
        evaluated = found.all("eval_loss")
        gaps = [abs(a - b) for a, b in zip(evaluated, reference.evaluations, strict=True)]
        if max(gaps, default=0.0) > 1e-4:
            problems.append(f"{strategy}: evaluations {evaluated}, alone {reference.evaluations}")
        if job.settings.get("max_grad_norm") and min(found.all("grad_norm")) < 0.5:
            problems.append(f"{strategy}: logged norms {found.all('grad_norm')}")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("name", ["galore, clipped, accumulated", "schedule-free, evaluated"])
def test_every_strategy_stays_within_the_noise_floor_of_one_process(
    name: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    strategies = ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"]
    two_ranks.run(is_within_the_floor, name, strategies, str(tmp_path))


def test_hsdp_stays_within_the_noise_floor_of_one_process(four_ranks: RankPool, tmp_path: Path) -> None:
    four_ranks.run(is_within_the_floor, "galore, clipped, on four ranks", ["hsdp"], str(tmp_path))
