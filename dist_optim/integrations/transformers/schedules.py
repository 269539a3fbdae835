"""Hugging Face Trainer: its arguments as a schedule, and its evaluations as decisions that all ranks take together.

The stock Trainer lets each rank step on what its own ``compute_metrics`` returned, so that anything random, timed or
rank-dependent in there parts the ranks for good.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from dist_optim.errors import ScheduleError
from dist_optim.reporting.files import DECISIONS
from dist_optim.schedulers import (
    MetricScheduler,
    Recipe,
    build_scheduler,
    inner_optimizer,
    metric_scheduler_in,
    refuse_other_mode,
    resolve_schedule,
    takes_metric,
)

__all__ = [
    "decide_after_evaluation",
    "refuse_without_evaluation",
    "scheduler_for_trainer",
    "shared_schedule",
]


def scheduler_for_trainer(args: Any, optimizer: Any, num_training_steps: int) -> LRScheduler | MetricScheduler:
    """What ``Trainer.create_scheduler`` creates. Collective.

    ``lr_scheduler_kwargs`` may also hold ``metric_from_rank``, ``on_nonfinite`` and ``log_path`` of
    ``build_scheduler``. A metric schedule follows ``metric_for_best_model`` in the direction of ``greater_is_better``,
    and writes its decisions to ``output_dir/lr_decisions.jsonl`` where no other ``log_path`` is set.

    Args:
        args: The ``TrainingArguments``.
        optimizer: What steps, wrapped or not.
        num_training_steps: Optimizer steps of the whole run.

    Raises:
        ScheduleError: As ``build_scheduler``, and where a metric schedule would never see a metric.
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    options = dict(args.lr_scheduler_kwargs or {})
    decision: dict[str, Any] = {}
    recipe = resolve_schedule(name)
    if recipe.is_metric_driven:
        _refuse_without_decisions(name, args, num_training_steps)
        decision = _decision_options(name, args)
    built = build_scheduler(
        optimizer,
        name,
        num_training_steps=num_training_steps,
        num_warmup_steps=0 if _is_optimizers_own_warmup(recipe, optimizer) else args.warmup_steps,
        **{**decision, **options},
    )
    return _as_upstream(built)


def shared_schedule(args: Any, optimizer: Any, given: Any) -> Any:
    """A schedule that was given to the Trainer: shared by all ranks where it follows a metric, as it is otherwise.

    Raises:
        ScheduleError: As ``scheduler_for_trainer``.
    """
    if not takes_metric(given):
        return given
    return _as_upstream(build_scheduler(optimizer, given, **_decision_options(type(given).__name__, args)))


class _UpstreamsInTheTrainer(MetricScheduler):
    """In the Trainer also an instance of upstream's class, with its attributes: transformers and callbacks ask for it.

    Elsewhere it must be none: accelerate would wrap it (see ``MetricScheduler``). The Trainer prepares no schedule.
    """

    @property  # type: ignore[misc]  # as proxies have it: isinstance asks for it
    def __class__(self) -> Any:
        return type(self.scheduler)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.scheduler, name)


def _as_upstream(built: Any) -> Any:
    if type(built) is MetricScheduler:
        built.__class__ = _UpstreamsInTheTrainer
    return built


def decide_after_evaluation(lr_scheduler: Any, metrics: MutableMapping[str, Any], args: Any, step: int) -> None:
    """Take the decision that follows an evaluation. Collective where the schedule follows a metric; else nothing.

    A rank whose ``metrics`` lack the metric takes part, and does not count. Afterwards ``metrics`` hold the reduced
    metric on every rank (NaN where none was finite), so that ranks also agree on which model is the best.

    Args:
        lr_scheduler: The Trainer's, wrapped or not.
        metrics: What ``evaluate`` returned on this rank.
        args: The ``TrainingArguments``.
        step: ``state.global_step``, for the log.

    Raises:
        MetricError: On all ranks: none of them has the metric.
        ScheduleError: ``greater_is_better`` says that the metric improves the other way.
    """
    scheduler = metric_scheduler_in(lr_scheduler)
    if scheduler is None:
        return
    if args.greater_is_better is not None:  # the schedule may come from DeepSpeed's JSON
        refuse_other_mode(scheduler.scheduler, args.greater_is_better)
    name = str(args.metric_for_best_model or "loss")
    key = name if name.startswith("eval_") else f"eval_{name}"
    made = scheduler.step(
        metrics.get(key),
        at_step=step,
        absence=(
            f"metric_for_best_model={name!r} asks for {key!r}, and evaluation gave: {', '.join(metrics) or 'nothing'}. "
            "Return it from compute_metrics on at least one rank, or set metric_for_best_model to one that is there."
        ),
    )
    if made is not None:
        metrics[key] = math.nan if made["metric"] is None else made["metric"]


def _refuse_without_decisions(name: str, args: Any, num_training_steps: int) -> None:
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "steps" and args.eval_steps > num_training_steps:
        raise ScheduleError(
            f"lr_scheduler_type={name!r} decides after every eval_steps steps, and eval_steps {args.eval_steps} gives "
            f"no decision in {num_training_steps} steps. Set eval_steps to a small part of them."
        )


def _decision_options(name: str, args: Any) -> dict[str, Any]:
    refuse_without_evaluation(name, args)
    return {
        "greater_is_better": args.greater_is_better,
        "log_path": os.path.join(args.output_dir, DECISIONS),
        "stepped_by_engine": True,  # the Trainer's loop, or DeepSpeed's engine
    }


def _is_optimizers_own_warmup(recipe: Recipe, optimizer: Any) -> bool:
    """Whether ``warmup_steps`` is an option of the optimizer (schedule-free), and the schedule has no such length."""
    spec = getattr(inner_optimizer(optimizer), "spec", None)
    takes_it = spec is not None and any(record.name == "warmup_steps" for record in spec.records())
    return takes_it and "num_warmup_steps" not in recipe.lengths


def refuse_without_evaluation(name: str, args: Any) -> None:
    """Refuse a schedule that decides after evaluations, where there are none.

    Raises:
        ScheduleError: With what to set.
    """
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "no":
        raise ScheduleError(
            f"lr_scheduler_type={name!r} decides after each evaluation, and none is configured. Set eval_strategy "
            'to "steps" (with eval_steps) or "epoch".'
        )
