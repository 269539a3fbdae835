"""Options of the build beside the hyperparameters, and what the build says of all of it together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from dist_optim.doctor.asking import Remedy, asking, refusal_of
from dist_optim.doctor.finding import Change, Finding, Rule
from dist_optim.doctor.rules.models import LLAMA
from dist_optim.doctor.rules.places import ZERO2, build_options, flags, option
from dist_optim.doctor.subject import Subject
from dist_optim.specs.catalogue import missing_packages

__all__ = ["RULES"]

OPTIONS = ("master_weights", "verify_steps", "fused_backward", "on_nonfinite", "reduce_to_owner")


def _options(subject: Subject) -> dict[str, Any]:
    own = {key: value for key, value in subject.optim_args.items() if key in OPTIONS}
    flag = subject.arguments.get("verify_steps")
    return {**own, **({"verify_steps": flag} if flag else {})}


def _of_engine(subject: Subject) -> str:
    from dist_optim.integrations.deepspeed.engine import refuse_options

    spec = subject.spec
    if spec is None or subject.strategy != "deepspeed":
        return ""
    asked = {key: value for key, value in _options(subject).items() if key != "verify_steps"}
    return refusal_of(lambda: refuse_options(spec, **asked))


def _inside_backward(subject: Subject) -> str:
    from dist_optim.building.choice import refuse_inside_backward

    spec, asked = subject.spec, _options(subject)
    is_fused = asked.get("fused_backward")
    if spec is None or subject.strategy == "deepspeed" or not (is_fused or (spec.instead and is_fused is not False)):
        return ""
    values = (asked.get("on_nonfinite"), asked.get("master_weights", False), asked.get("verify_steps", 0))
    return refusal_of(lambda: refuse_inside_backward(spec, *values))


def _without(key: str, code: str, example: dict[str, Any]) -> Remedy:
    def changes(subject: Subject) -> Iterator[Change]:
        if key in subject.optim_args:
            yield option(subject, key)
        if key in subject.arguments:
            yield Change("arguments", (key,))

    return Remedy(code=code, changes=changes, example=example)


def _on_engine(key: str, value: Any) -> Remedy:
    example = {"deepspeed": ZERO2, **flags(optim="lion", optim_args={key: value})}
    return _without(key, f"deepspeed-{key.replace('_', '-')}", example)


def _in_backward(key: str, value: Any) -> Remedy:
    example = flags(optim="lion", optim_args={"fused_backward": True, key: value})
    return _without(key, f"inside-backward-{key.replace('_', '-')}", example)


def _find_values(subject: Subject) -> Iterator[Finding]:
    """Options that say nothing, each alone."""
    from dist_optim.building.arguments import check_settings
    from dist_optim.stepping.nonfinite import check_choice

    neutral: dict[str, Any] = {"bucket_bytes": 1, "check_ranks_every": 0}
    for key, value in subject.optim_args.items():
        if key == "on_nonfinite":
            reason = refusal_of(lambda value=value: check_choice(value))  # type: ignore[misc]
        elif key in inspect.signature(check_settings).parameters:
            reason = refusal_of(lambda one={key: value}: check_settings(**{**neutral, **one}))  # type: ignore[misc]
        else:
            continue
        if reason:
            yield Finding(code="option-value", reason=reason, changes=(option(subject, key),))


def _find_independent(subject: Subject) -> Iterator[Finding]:
    from dist_optim.building.verdicts import with_verdict

    spec, asked = subject.spec, subject.optim_args.get("independent")
    if spec is None or spec.is_undescribed or asked is None:
        return
    if reason := refusal_of(lambda: with_verdict(spec, [], {}, None, asked)):
        yield Finding(code="independent-of-a-name", reason=reason, changes=(option(subject, "independent"),))


def _find_build(subject: Subject) -> Iterator[Finding]:
    """What the build refuses on the model's own names and shapes, and no other rule has a patch for."""
    from dist_optim.building.choice import refuse_combination
    from dist_optim.building.composing import Rest, compose
    from dist_optim.layouts.detect import detect

    spec, model = subject.spec, subject.meta_model()
    if spec is None or spec.is_undescribed or spec.refusal or missing_packages(spec):
        return
    given = dict(subject.optim_args)
    rest_options = {key.removeprefix("rest_"): given.pop(key) for key in list(given) if key.startswith("rest_")}
    rest = Rest(given.pop("rest", None), {**rest_options, **(rest_options.pop("options", None) or {})})
    targets = subject.arguments.get("optim_target_modules") or given.pop("target_modules", None)
    groups, no_decay = given.pop("params", None), given.pop("no_decay", ())
    is_fused = bool(given.get("fused_backward"))
    own = {key: value for key, value in given.items() if key not in build_options()}

    def build() -> None:
        composed, _, _ = compose(
            model,
            spec,
            detect(model),
            own,
            params=groups,
            no_decay=no_decay,
            target_modules=targets,
            rest=rest,
            takes_idle=False,
        )
        refuse_combination(composed, is_fused=is_fused)

    if reason := refusal_of(build) if model is not None else "":
        yield Finding(code="build-refused", reason=reason)


RULES: tuple[Rule, ...] = (
    *asking(
        _of_engine,
        _on_engine("master_weights", True),
        _on_engine("fused_backward", True),
        _on_engine("on_nonfinite", "skip"),
        _on_engine("reduce_to_owner", True),
    ),
    *asking(
        _inside_backward,
        _in_backward("on_nonfinite", "skip"),
        _in_backward("master_weights", True),
        _in_backward("verify_steps", 2),
    ),
    Rule(
        code="option-value",
        find=_find_values,
        example=flags(optim="lion", optim_args={"on_nonfinite": "ignore"}),
    ),
    Rule(
        code="independent-of-a-name",
        find=_find_independent,
        example=flags(optim="lion", optim_args={"independent": True}),
    ),
    Rule(
        code="build-refused",
        find=_find_build,
        example={"model": LLAMA, **flags(optim="muon", optim_args={"rest": "no_such"})},
    ),
)
