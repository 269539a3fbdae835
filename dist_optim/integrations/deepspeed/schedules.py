"""DeepSpeed's JSON: names of schedules that its ``scheduler`` section resolves beside DeepSpeed's own.

::

    {"scheduler": {"type": "greedy", "params": {"patience": 2, "min_lr": 1e-6, "log_path": "lr_decisions.jsonl"}}}

``params`` are the keywords of ``dist_optim.build_scheduler``. The engine steps its schedule after every batch and knows
no metric: a metric schedule does nothing then, and decides when ``engine.lr_scheduler.step(metric)`` is called on all
ranks. Classes of torch, which DeepSpeed gives a wrapper that they refuse, are given the optimizer inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dist_optim.schedulers import build_scheduler, metric_scheduler_in, schedule_names, takes_metric

__all__ = ["feeds_wrong_metric", "register_schedules"]


def register_schedules() -> None:
    """Make every schedule's name resolve in the JSON; names that DeepSpeed has itself stay its own."""
    from deepspeed.runtime import lr_schedules

    classes = [name for name in torch.optim.lr_scheduler.__all__ if name != "LRScheduler"]
    for name in (*schedule_names(), *classes):
        if not hasattr(lr_schedules, name):
            setattr(lr_schedules, name, _factory(name))


def _factory(name: str) -> Callable[..., Any]:
    def build(optimizer: Any, **params: Any) -> Any:
        return build_scheduler(optimizer, name, stepped_by_engine=True, **params)

    build.__name__ = build.__qualname__ = name
    return build


def feeds_wrong_metric(engine: Any) -> bool:
    """Whether the engine would give its schedule the batch size in place of a metric: it does when one is asked for."""
    schedule = engine.lr_scheduler
    if schedule is None or metric_scheduler_in(schedule) is not None:
        return False
    return takes_metric(schedule)
