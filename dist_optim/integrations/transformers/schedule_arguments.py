"""``lr_scheduler_type`` and ``lr_scheduler_kwargs`` of a ``TrainingArguments`` that takes every schedule there is."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import SchedulerType

from dist_optim.errors import UsageError
from dist_optim.schedulers import resolve_schedule
from dist_optim.specs.hyperparameters import parse_optim_args

__all__ = ["any_schedule", "read_schedule_options"]

DECISION_OPTIONS = ("metric_from_rank", "on_nonfinite")


@contextmanager
def any_schedule(arguments: Any) -> Iterator[None]:
    """Around the ``__post_init__`` of transformers, which knows its own names alone and reads JSON alone.

    Sets ``arguments.follows_metric``: whether the schedule decides after evaluations.

    Raises:
        ScheduleError: The schedule is unknown, or has no such option.
        UsageError: The options cannot be read.
    """
    arguments.lr_scheduler_kwargs = read_schedule_options(arguments.lr_scheduler_kwargs)
    known = {one.value: one for one in SchedulerType}
    name = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    recipe = resolve_schedule(name)
    recipe.check({key: value for key, value in arguments.lr_scheduler_kwargs.items() if key not in DECISION_OPTIONS})
    arguments.follows_metric = recipe.is_metric_driven
    if recipe.is_metric_driven:
        arguments.metric_for_best_model = arguments.metric_for_best_model or "loss"
    if name not in known:
        arguments.lr_scheduler_type = SchedulerType.LINEAR
    yield
    arguments.lr_scheduler_type = known.get(name, name)


def read_schedule_options(given: Any) -> dict[str, Any]:
    """The options as JSON, as a Python dict, or as ``key=value, key=value``.

    Raises:
        DistOptimError: They cannot be read.
    """
    if isinstance(given, dict):
        return given
    if given is None or not given.strip().startswith("{"):
        return parse_optim_args(given)
    for read in (json.loads, ast.literal_eval):
        try:
            return dict(read(given))
        except (ValueError, SyntaxError, TypeError):
            continue
    raise UsageError(
        f'lr_scheduler_kwargs {given!r} cannot be read. Write "patience=2, factor=0.5", or the same as JSON.'
    )
