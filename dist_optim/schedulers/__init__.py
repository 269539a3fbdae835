"""Learning-rate schedules, upstream's own classes, with one decision for all ranks where a metric decides.

::

    build_scheduler(optimizer, "greedy", greater_is_better=False, log_path="lr_decisions.jsonl", min_lr=1e-6)

A schedule that follows the step count is returned as upstream's object. One that follows a metric (GreedyLR,
ReduceLROnPlateau, a class whose ``step`` takes a metric) is returned inside a ``MetricScheduler``: all ranks call
``scheduler.step(metric)``, and the metric is reduced, the decision taken once, and obeyed by every rank.

Integrations use (``dist_optim.integrations.transformers.schedules``)::

    scheduler_for_trainer(args, optimizer, num_training_steps) -> LRScheduler | MetricScheduler
        # all of Trainer.create_scheduler: args is the TrainingArguments
    shared_schedule(args, optimizer, given)  # the same for a schedule that was given to the Trainer
    decide_after_evaluation(lr_scheduler, metrics, args, step) -> None
        # after every evaluation, on every rank; nothing for schedules that follow the step count

Reading order: ``names`` (from a name to upstream's class), ``limits`` (what a metric schedule may not be asked for),
``metric`` (one number from what ranks gave), ``shared`` (the decision), ``decisions`` (its log), ``building``.
"""

from dist_optim.schedulers.building import build_scheduler, inner_optimizer, metric_scheduler_in
from dist_optim.schedulers.limits import refuse_other_mode
from dist_optim.schedulers.names import Recipe, resolve_schedule, schedule_names, takes_metric
from dist_optim.schedulers.shared import MetricScheduler

__all__ = [
    "MetricScheduler",
    "Recipe",
    "build_scheduler",
    "inner_optimizer",
    "metric_scheduler_in",
    "refuse_other_mode",
    "resolve_schedule",
    "schedule_names",
    "takes_metric",
]
