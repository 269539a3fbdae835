"""The script's other arguments: numbers out of range, flags that nothing obeys, schedules that could not decide."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from dist_optim.doctor.asking import refusal_of
from dist_optim.doctor.finding import Change, Finding, Rule
from dist_optim.doctor.subject import Subject
from dist_optim.specs.catalogue import missing_packages

__all__ = ["RULES"]

OFFERED = (("adam_beta1", "adam_beta2"), ("adam_epsilon",), ("weight_decay",), ("warmup_steps",), ("learning_rate",))
"""Flags that mean a hyperparameter of the optimizer."""


def _find_ranges(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.argument_ranges import RANGES, check_ranges

    for name, allowed in RANGES.items():
        if name in subject.arguments:
            reason = refusal_of(lambda one={name: allowed}: check_ranges(subject.namespace(), one))  # type: ignore[misc]
            if reason:
                yield Finding(code="out-of-range", reason=reason, changes=(Change("arguments", (name,)),))


def _find_ignored(subject: Subject) -> Iterator[Finding]:
    """Flags that the optimizer has nothing for, or that contradict its own arguments."""
    from dist_optim.integrations.transformers.arguments import read_hyperparameters, values_for

    spec = subject.spec
    if spec is None or missing_packages(spec) or "optim" not in subject.arguments:
        return
    given: dict[str, Any] = {key: subject.arguments[key] for key in ("optim", "optim_args") if key in subject.arguments}
    if refusal_of(lambda: read_hyperparameters(Subject(arguments=given).namespace())):
        return
    for flags in OFFERED:
        own = {flag: subject.arguments[flag] for flag in flags if flag in subject.arguments}
        alone = Subject(arguments={**given, **own}).namespace()
        reason = refusal_of(lambda alone=alone: values_for(spec, alone)) if own else ""  # type: ignore[misc]
        if reason:
            changes = tuple(Change("arguments", (flag,)) for flag in own)
            yield Finding(code="flag-not-obeyed", reason=reason, changes=changes)


def _find_optim_args(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.arguments import read_hyperparameters

    if reason := refusal_of(lambda: read_hyperparameters(subject.namespace())):
        yield Finding(code="optim-args-unreadable", reason=reason)


# Schedules -----------------------------------------------------------------------------------------------------------


def _schedule(subject: Subject) -> str:
    return str(subject.arguments.get("lr_scheduler_type") or "")


def _options(subject: Subject) -> Mapping[str, Any]:
    from dist_optim.integrations.transformers.schedule_arguments import read_schedule_options

    options: Mapping[str, Any] = {}

    def read() -> None:
        nonlocal options
        options = read_schedule_options(subject.arguments.get("lr_scheduler_kwargs"))

    refusal_of(read)
    return options


def _find_schedule(subject: Subject) -> Iterator[Finding]:
    from dist_optim.schedulers import resolve_schedule, schedule_names

    name = _schedule(subject)
    if not name:
        return
    if reason := refusal_of(lambda: resolve_schedule(name)):
        near = difflib.get_close_matches(name, schedule_names(), n=1, cutoff=0.4)
        change = Change("arguments", ("lr_scheduler_type",), near[0] if near else "linear")
        yield Finding(code="schedule-unknown", reason=reason, changes=(change,))


def _recipe(subject: Subject) -> Any:
    """Of a schedule that is known; None of others."""
    from dist_optim.schedulers import resolve_schedule

    name = _schedule(subject)
    return resolve_schedule(name) if name and not refusal_of(lambda: resolve_schedule(name)) else None


def _find_schedule_options(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.schedule_arguments import DECISION_OPTIONS

    recipe = _recipe(subject)
    for key in [] if recipe is None else [one for one in _options(subject) if one not in DECISION_OPTIONS]:
        known = recipe.options
        if key in known or recipe.takes_anything:
            continue
        reason = refusal_of(lambda key=key: recipe.check({key: None}))  # type: ignore[misc]
        kept = {own: value for own, value in _options(subject).items() if own != key}
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
        options = {**kept, near[0]: _options(subject)[key]} if near else kept
        yield Finding(
            code="schedule-option", reason=reason, changes=(Change("arguments", ("lr_scheduler_kwargs",), options),)
        )


def _find_no_evaluation(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.schedules import refuse_without_evaluation

    recipe = _recipe(subject)
    if recipe is None or not recipe.is_metric_driven:
        return
    if reason := refusal_of(lambda: refuse_without_evaluation(recipe.name, subject.namespace())):
        changes = (Change("arguments", ("eval_strategy",), "steps"), Change("arguments", ("eval_steps",), 100))
        yield Finding(code="schedule-without-evaluation", reason=reason, changes=changes)


def _find_immovable(subject: Subject) -> Iterator[Finding]:
    import torch

    from dist_optim.schedulers import build_scheduler

    recipe, rate = _recipe(subject), float(subject.namespace().learning_rate)
    if recipe is None or not recipe.is_metric_driven or not 0 < rate < float("inf"):
        return
    options = _options(subject)

    def build(**more: Any) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device="cpu"))], lr=rate)
        build_scheduler(optimizer, recipe.name, **{**options, **more})

    if reason := refusal_of(build):
        served = next((one for one in _bounds(rate) if not refusal_of(lambda one=one: build(**one))), None)  # type: ignore[misc]
        changes = () if served is None else (Change("arguments", ("lr_scheduler_kwargs",), {**options, **served}),)
        yield Finding(code="schedule-immovable", reason=reason, changes=changes)


def _bounds(rate: float) -> list[dict[str, float]]:
    """Options with which a rate like this one can move, the least change first."""
    return [{"eps": 0.0}, {"min_lr": rate / 100}, {"max_lr": rate * 10}, {"min_lr": rate / 100, "max_lr": rate * 10}]


def _with(**arguments: Any) -> dict[str, Any]:
    return {"arguments": {"output_dir": "out", **arguments}}


RULES: tuple[Rule, ...] = (
    Rule(code="out-of-range", find=_find_ranges, example=_with(learning_rate=-1.0)),
    Rule(code="optim-args-unreadable", find=_find_optim_args),
    Rule(code="flag-not-obeyed", find=_find_ignored, example=_with(optim="sgd", adam_beta2=0.95)),
    Rule(code="schedule-unknown", find=_find_schedule, example=_with(lr_scheduler_type="cosin")),
    Rule(
        code="schedule-option",
        find=_find_schedule_options,
        example=_with(
            lr_scheduler_type="greedy", lr_scheduler_kwargs={"patiance": 3, "min_lr": 0.0}, eval_strategy="epoch"
        ),
    ),
    Rule(
        code="schedule-without-evaluation",
        find=_find_no_evaluation,
        example=_with(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="no"),
    ),
    Rule(
        code="schedule-immovable",
        find=_find_immovable,
        example=_with(lr_scheduler_type="greedy", learning_rate=1e-5, eval_strategy="epoch"),
    ),
)
