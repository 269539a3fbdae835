"""The optimizer's name and its hyperparameters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from dist_optim.doctor.asking import Remedy, asking, refusal_of
from dist_optim.doctor.finding import Change, Finding, Rule
from dist_optim.doctor.rules.places import FSDP1, FSDP2, build_options, flags, named, option
from dist_optim.doctor.subject import Subject
from dist_optim.specs.catalogue import missing_packages
from dist_optim.specs.registry import Trait, get_spec, names

__all__ = ["RULES"]


# Names ---------------------------------------------------------------------------------------------------------------


def _find_unknown(subject: Subject) -> Iterator[Finding]:
    if not subject.optim or subject.spec is not None or subject.optim in _known_elsewhere(subject):
        return
    reason = refusal_of(lambda: get_spec(subject.optim))
    near = difflib.get_close_matches(subject.optim.lower().replace("-", "_"), names(), n=1, cutoff=0.4)
    yield Finding(code="optimizer-unknown", reason=reason, changes=(named(subject, near[0]),) if near else ())


def _known_elsewhere(subject: Subject) -> list[str]:
    """Names of transformers', or of DeepSpeed's where its JSON holds the name."""
    from transformers.training_args import OptimizerNames

    if subject.arguments.get("optim"):
        return [member.value for member in OptimizerNames]
    try:
        from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    except ImportError:
        return [subject.optim]
    return [*DEEPSPEED_OPTIMIZERS, *(name.capitalize() for name in DEEPSPEED_OPTIMIZERS), "AdamW"]


def _find_refused(subject: Subject) -> Iterator[Finding]:
    if subject.spec is not None and subject.spec.refusal:
        yield Finding(code="optimizer-refused", reason=f"{subject.spec.name}: {subject.spec.refusal}")


def _of_transformers(subject: Subject) -> str:
    from dist_optim.integrations.transformers.names import why_not_sharded

    if subject.spec is not None or not subject.optim or not subject.strategy:
        return ""
    return str(why_not_sharded(subject.optim) or "")


def _instead(subject: Subject) -> Iterator[Change]:
    from dist_optim.integrations.transformers.names import INSTEAD

    text = INSTEAD.get(subject.optim, "")
    if text:
        yield named(subject, re.split(r"[ ,]", text)[0])
    for key, value in re.findall(r"optim_args='(\w+)=(\d+)'", text):
        yield Change("arguments", ("optim_args",), {**subject.optim_args, key: int(value)})


def _not_installed(subject: Subject) -> str:
    """A name that transformers alone knows, and has no package for."""
    from dist_optim.integrations.transformers.names import INSTEAD, class_known_to_transformers

    if subject.spec is not None or subject.optim not in INSTEAD or not subject.arguments.get("optim"):
        return ""
    return refusal_of(lambda: class_known_to_transformers(subject.namespace(), None))


def _find_contradicted_names(subject: Subject) -> Iterator[Finding]:
    """A name that stands for a hyperparameter too, beside another value of it."""
    from dist_optim.integrations.transformers.choosing import named_hyperparameters
    from dist_optim.integrations.transformers.names import meaning_of

    meaning = meaning_of(subject.optim) if subject.arguments.get("optim") else None
    if meaning is None:
        return
    if reason := refusal_of(lambda: named_hyperparameters(subject.namespace(), meaning)):
        changes = tuple(option(subject, key) for key in meaning.fixed if key in subject.optim_args)
        yield Finding(code="name-contradicted", reason=reason, changes=changes)


def _layerwise(subject: Subject) -> str:
    """A name that is always stepped inside backward, where that is not served."""
    from dist_optim.building.choice import resolve
    from dist_optim.inside_backward.guards import NOT_UNDER_FSDP1

    spec = subject.spec
    if spec is None or not spec.instead or missing_packages(spec):
        return ""
    if subject.strategy == "deepspeed":
        return refusal_of(lambda: resolve(spec.name))
    return f"{spec.name}: {NOT_UNDER_FSDP1}" if subject.strategy == "fsdp1" else ""


def _accumulating(subject: Subject) -> str:
    from dist_optim.integrations.transformers.inside_backward import refuse_accumulation

    spec = subject.spec
    if spec is None or not spec.instead:
        return ""
    return refusal_of(lambda: refuse_accumulation(spec, subject.namespace()))


def _stored(subject: Subject) -> Iterable[Change]:
    return [named(subject, subject.spec.instead)] if subject.spec is not None else ()


def _half_inside_backward(subject: Subject) -> str:
    """fp16 scales gradients until the step, and inside backward they are applied before it."""
    from dist_optim.integrations.accelerate.placing import refuse_stored_gradients

    spec, own = subject.spec, subject.optim_args.get("fused_backward")
    is_half = subject.arguments.get("fp16") or (subject.accelerate or {}).get("mixed_precision") == "fp16"
    if spec is None or subject.strategy == "deepspeed" or not is_half or not (own or (spec.instead and own is None)):
        return ""
    asked: Any = SimpleNamespace(gradient_accumulation_steps=1, scaler=is_half)
    return refusal_of(lambda: refuse_stored_gradients(asked, spec.name))


def _in_bf16(subject: Subject) -> Iterator[Change]:
    if subject.arguments.get("fp16"):
        yield Change("arguments", ("fp16",))
        yield Change("arguments", ("bf16",), True)
    if (subject.accelerate or {}).get("mixed_precision") == "fp16":
        yield Change("accelerate", ("mixed_precision",), "bf16")


# Hyperparameters -----------------------------------------------------------------------------------------------------


def _own_args(subject: Subject) -> dict[str, Any]:
    """Of ``optim_args``, what the optimizer itself is given."""
    ours = build_options()
    return {key: one for key, one in subject.optim_args.items() if key not in ours and not key.startswith("rest_")}


def _find_hyperparameters(subject: Subject) -> Iterator[Finding]:
    spec = subject.spec
    if spec is None or spec.is_undescribed or missing_packages(spec):
        return
    records = {record.name: record for record in spec.records()}
    needed = {one.name: one.minimum if one.default is None else one.default for one in records.values() if one.required}
    for key, value in _own_args(subject).items():
        reason = refusal_of(lambda key=key, value=value: spec.check({**needed, key: value}))  # type: ignore[misc]
        if not reason:
            continue
        near = difflib.get_close_matches(key, [*records, *build_options()], n=1, cutoff=0.7)
        renamed = (option(subject, near[0], value),) if key not in records and near else ()
        changes = (option(subject, key), *renamed)
        code = "hyperparameter-unknown" if key not in records else "hyperparameter-value"
        yield Finding(code=code, reason=reason, changes=changes)


def _find_targets(subject: Subject) -> Iterator[Finding]:
    import torch

    from dist_optim.building.targets import select_matrices

    spec, model = subject.spec, subject.meta_model()
    if spec is None or Trait.LOW_RANK not in spec.traits:
        return
    asked = subject.arguments.get("optim_target_modules") or subject.optim_args.get("target_modules")
    if asked and model is None:
        return  # nobody knows the names of its layers
    stand_in = torch.nn.Linear(2, 2, device="meta")
    asked = asked[0] if isinstance(asked, list) and len(asked) == 1 else asked
    if reason := refusal_of(lambda: select_matrices(model or stand_in, asked, spec.name)):
        reason = reason if model is not None else reason.partition(" Linear layers of this model")[0]
        in_json = not subject.arguments.get("optim") and bool(subject.json_optimizer)
        place = ("deepspeed", ("optimizer", "params", "target_modules")) if in_json else None
        change = Change("arguments", ("optim_target_modules",), ["all-linear"])
        yield Finding(
            code="target-modules",
            reason=reason,
            changes=(Change("deepspeed", place[1], "all-linear") if place else change,),
        )


def _find_two_clips(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.inside_backward import refuse_two_bounds

    spec, own = subject.spec, subject.optim_args.get("clip_grad_norm")
    if spec is None or Trait.FUSED_BACKWARD not in spec.traits or own is None or not subject.arguments:
        return
    if reason := refusal_of(lambda: refuse_two_bounds(spec, own, float(subject.namespace().max_grad_norm))):
        yield Finding(code="two-clips", reason=reason, changes=(Change("arguments", ("max_grad_norm",), own),))


RULES: tuple[Rule, ...] = (
    Rule(code="optimizer-unknown", find=_find_unknown, example=flags(optim="galore_adamwx")),
    Rule(code="optimizer-refused", find=_find_refused),
    *asking(
        _of_transformers,
        Remedy(
            code="optimizer-not-sharded",
            changes=_instead,
            example={"accelerate": FSDP2, **flags(optim="paged_adamw_32bit")},
        ),
    ),
    *asking(
        _not_installed,
        Remedy(code="optimizer-not-installed", changes=_instead, example=flags(optim="adamw_torch_xla")),
    ),
    Rule(
        code="name-contradicted",
        find=_find_contradicted_names,
        example=flags(optim="lion_32bit", optim_args="optim_bits=8"),
    ),
    *asking(
        _layerwise,
        Remedy(
            code="layerwise-engine",
            changes=_stored,
            example={
                "accelerate": FSDP1,
                **flags(optim="galore_adamw_layerwise", optim_target_modules=["all-linear"]),
            },
        ),
    ),
    *asking(
        _accumulating,
        Remedy(
            code="layerwise-accumulation",
            changes=_stored,
            example=flags(
                optim="galore_adamw_layerwise", optim_target_modules=["all-linear"], gradient_accumulation_steps=4
            ),
        ),
    ),
    *asking(
        _half_inside_backward,
        Remedy(
            code="inside-backward-fp16",
            changes=_in_bf16,
            example=flags(optim="galore_adamw_layerwise", optim_target_modules=["all-linear"], fp16=True),
        ),
    ),
    Rule(
        code="hyperparameter-unknown",
        find=lambda subject: (one for one in _find_hyperparameters(subject) if one.code == "hyperparameter-unknown"),
        example=flags(optim="galore_adamw", optim_target_modules=["all-linear"], optim_args="update_proj_gapp=100"),
    ),
    Rule(
        code="hyperparameter-value",
        find=lambda subject: (one for one in _find_hyperparameters(subject) if one.code == "hyperparameter-value"),
        example=flags(optim="schedule_free_adamw", optim_args="warmup_steps=0.1"),
    ),
    Rule(code="target-modules", find=_find_targets, example=flags(optim="galore_adamw")),
    Rule(code="two-clips", find=_find_two_clips, example=flags(optim="lomo", optim_args="clip_grad_norm=0.5")),
)
