"""The learning rate of `launch/train.py`: its schedule from the flags, decisions after evaluations, and the plot."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dist_optim import MetricScheduler, parse_optim_args
from dist_optim.schedulers import resolve_schedule
from train_arguments import TrainArguments, UsageError
from train_plot import plot_over_steps

if TYPE_CHECKING:
    from train_loop import TrainingRun

__all__ = ["LOG_NAME", "PLOT_NAME", "build_options", "check_schedule", "decide", "plot_rates", "step", "summarize"]

LOG_NAME, PLOT_NAME = "lr_decisions.jsonl", "lr.png"
DECISION_OPTIONS = ("metric_from_rank", "on_nonfinite")
MARKERS = {"raised": "^", "lowered": "v", "reset": "s", "changed": "D", "skipped": "x"}


def check_schedule(arguments: TrainArguments) -> dict[str, Any]:
    """What `--lr_scheduler_kwargs` says, once the schedule's name and options are known to exist.

    Raises:
        ScheduleError: Unknown name or option; the nearest known ones are named.
        UsageError: The text cannot be read.
    """
    options = _read_options(arguments.lr_scheduler_kwargs)
    recipe = resolve_schedule(arguments.lr_scheduler_type)
    recipe.check({key: value for key, value in options.items() if key not in DECISION_OPTIONS})
    return options


def build_options(arguments: TrainArguments, num_steps: int, unfinished: Path) -> dict[str, Any]:
    """Keywords of `dist_optim.build_scheduler`.

    Raises:
        DistOptimError: As `check_schedule`, and where no evaluation would ever decide.
    """
    options = check_schedule(arguments)
    lengths = {"num_training_steps": num_steps, "num_warmup_steps": arguments.warmup_steps}
    if not resolve_schedule(arguments.lr_scheduler_type).is_metric_driven:
        return {**lengths, **options}
    if arguments.eval_steps > num_steps:
        raise UsageError(
            f"--lr_scheduler_type {arguments.lr_scheduler_type} decides after every --eval_steps steps, and "
            f"--eval_steps {arguments.eval_steps} gives no decision in {num_steps} steps. Set --eval_steps to a small "
            "part of them."
        )
    return {**lengths, "greater_is_better": False, "log_path": unfinished / LOG_NAME, **options}


def _read_options(text: str | None) -> dict[str, Any]:
    """As JSON, as a Python dict (an arguments file's mapping), or as ``key=value, key=value``."""
    if text is None or not text.strip().startswith("{"):
        return parse_optim_args(text)
    for read in (json.loads, ast.literal_eval):
        try:
            options = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(options, dict):
            return options
    raise UsageError(
        f'--lr_scheduler_kwargs {text!r} cannot be read. Write "patience=2, factor=0.5", or the same as JSON.'
    )


def step(scheduler: Any) -> None:
    """After an optimizer step; what follows a metric waits for the evaluation."""
    if not isinstance(scheduler, MetricScheduler):
        scheduler.step()


def decide(run: TrainingRun) -> None:
    """After an evaluation: one decision for all ranks, where the schedule follows the loss. Collective."""
    if not isinstance(run.scheduler, MetricScheduler):
        return
    made = run.scheduler.step(run.eval_losses[-1], at_step=run.step)
    if made is not None and run.directory is not None and made["old_lr"] != made["new_lr"]:
        tqdm.write(
            f"step {run.step}/{run.num_steps}: learning rate {made['decision']} from {made['old_lr'][0]:.3g} to "
            f"{made['new_lr'][0]:.3g}"
        )


def summarize(run: TrainingRun) -> dict[str, Any]:
    """The summary's part on the learning rate."""
    summary: dict[str, Any] = {
        "lr_scheduler_type": run.arguments.lr_scheduler_type,
        "learning_rate_last": float(run.optimizer.param_groups[0]["lr"]),
    }
    if isinstance(run.scheduler, MetricScheduler):
        summary["lr_decisions"] = dict(Counter(row["decision"] for row in run.scheduler.decisions))
    return summary


def plot_rates(rows: Iterable[Mapping[str, Any]], log: Path, target: Path) -> None:
    """The learning rate over the steps, and a mark at each decision that the log holds."""
    decisions = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    points = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    for made in decisions:  # the step before the decision used the old rate, the step after it uses the new one
        points += [(made["step"], made["old_lr"][0]), (made["step"] + 1, made["new_lr"][0])]
    points.sort(key=lambda point: point[0])
    with plot_over_steps("learning rate", target) as axes:
        axes.plot([at for at, _ in points], [rate for _, rate in points], "-", label="learning rate")
        for decision, marker in MARKERS.items():
            marked = [made for made in decisions if made["decision"] == decision]
            steps, rates = [made["step"] for made in marked], [made["old_lr"][0] for made in marked]
            if marked:
                axes.plot(steps, rates, marker, label=decision)
