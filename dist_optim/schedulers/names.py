"""From a name, a class or an instance to upstream's schedule: what it is called with, and whether a metric drives it.

Only this file knows where upstream's schedules live. transformers is imported when one of its own is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_optim.errors import MissingPackageError, ScheduleError

__all__ = ["Recipe", "resolve_schedule", "schedule_names", "takes_metric"]

_TRANSFORMERS, _TORCH = "transformers.optimization", "torch.optim.lr_scheduler"
_NAMED: Mapping[str, tuple[str, str]] = {
    "constant": (_TRANSFORMERS, "get_constant_schedule"),
    "constant_with_warmup": (_TRANSFORMERS, "get_constant_schedule_with_warmup"),
    "cosine": (_TRANSFORMERS, "get_cosine_schedule_with_warmup"),
    "cosine_warmup_with_min_lr": (_TRANSFORMERS, "get_cosine_with_min_lr_schedule_with_warmup_lr_rate"),
    "cosine_with_min_lr": (_TRANSFORMERS, "get_cosine_with_min_lr_schedule_with_warmup"),
    "cosine_with_restarts": (_TRANSFORMERS, "get_cosine_with_hard_restarts_schedule_with_warmup"),
    "greedy": (_TRANSFORMERS, "GreedyLR"),
    "inverse_sqrt": (_TRANSFORMERS, "get_inverse_sqrt_schedule"),
    "linear": (_TRANSFORMERS, "get_linear_schedule_with_warmup"),
    "polynomial": (_TRANSFORMERS, "get_polynomial_decay_schedule_with_warmup"),
    "reduce_lr_on_plateau": (_TORCH, "ReduceLROnPlateau"),
    "warmup_stable_decay": (_TRANSFORMERS, "get_wsd_schedule"),
}
# torch's module also holds base classes, and schedules that are made of other schedules rather than of options.
_NOT_BY_NAME = {"LRScheduler", "SequentialLR", "ChainedScheduler"}
_LENGTHS = ("num_training_steps", "num_warmup_steps")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one of upstream's schedules."""

    name: str
    make: Callable[..., Any]
    """Upstream's class or function: the optimizer first, then keywords."""
    is_metric_driven: bool

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What it may be given by name, besides the optimizer and the two lengths."""
        return {name: one for name, one in self._parameters().items() if name not in _LENGTHS}

    @property
    def lengths(self) -> dict[str, inspect.Parameter]:
        """Which of ``num_training_steps`` and ``num_warmup_steps`` it is made from."""
        return {name: one for name, one in self._parameters().items() if name in _LENGTHS}

    @property
    def takes_anything(self) -> bool:
        """Whether the class collects unknown keywords itself."""
        kinds = [one.kind for one in inspect.signature(self.make).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _parameters(self) -> dict[str, inspect.Parameter]:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        _, *others = inspect.signature(self.make).parameters.items()
        return {name: one for name, one in others if one.kind in named}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that upstream does not have, and the lack of those it must have.

        Raises:
            ScheduleError: With the nearest names, or with what is missing.
        """
        known = self.options
        for key in options:
            if key not in known and not self.takes_anything:
                near = difflib.get_close_matches(key, known, n=3)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise ScheduleError(f"{self.name} has no option {key!r}.{hint} {_listing(known)}")
        missing = [key for key, one in known.items() if one.default is inspect.Parameter.empty and key not in options]
        if missing:
            raise ScheduleError(f"{self.name} needs {', '.join(missing)}. {_listing(known)}")


def _listing(known: Mapping[str, inspect.Parameter]) -> str:
    if not known:
        return "It takes no options."
    words = [
        f"{key} (required)" if one.default is inspect.Parameter.empty else f"{key}={one.default!r}"
        for key, one in known.items()
    ]
    return f"Its options: {', '.join(words)}."


def schedule_names() -> list[str]:
    """The names that transformers gives to schedules, sorted. Class names of ``torch.optim.lr_scheduler`` serve too."""
    return sorted(_NAMED)


def resolve_schedule(schedule: str | type) -> Recipe:
    """The recipe of a name (of transformers, or of a torch class) or of a class.

    Raises:
        ScheduleError: No schedule has that name; the nearest are named.
        MissingPackageError: The name is one of transformers', which is not installed.
    """
    if not isinstance(schedule, str):
        return Recipe(schedule.__name__, schedule, takes_metric(schedule))
    name = str(getattr(schedule, "value", schedule))  # transformers' SchedulerType is an enumeration of strings
    torch_classes = _torch_classes()
    if name in torch_classes:
        return Recipe(name, torch_classes[name], takes_metric(torch_classes[name]))
    if name not in _NAMED:
        near = difflib.get_close_matches(name, [*_NAMED, *torch_classes], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ScheduleError(
            f"No schedule is called {name!r}.{hint} Known: {', '.join(_NAMED)}; and the classes of "
            f"torch.optim.lr_scheduler: {', '.join(sorted(torch_classes))}."
        )
    module, attribute = _NAMED[name]
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MissingPackageError(
            f"The schedule {name!r} is {module}.{attribute}, which cannot be imported ({error}). Install it with: "
            "pip install 'transformers>=5.10'"
        ) from error
    return Recipe(name, make, inspect.isclass(make) and takes_metric(make))


def takes_metric(schedule: Any) -> bool:
    """Whether ``step`` of a schedule, or of a class of schedules, cannot be called without a metric."""
    parameters = list(inspect.signature(schedule.step).parameters.values())
    if inspect.isclass(schedule):
        parameters = parameters[1:]
    return (
        bool(parameters)
        and parameters[0].default is inspect.Parameter.empty
        and parameters[0].kind
        in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
    )


def _torch_classes() -> dict[str, type]:
    schedules = torch.optim.lr_scheduler
    listed = {name: getattr(schedules, name) for name in schedules.__all__ if name not in _NOT_BY_NAME}
    return {name: one for name, one in listed.items() if inspect.isclass(one)}
