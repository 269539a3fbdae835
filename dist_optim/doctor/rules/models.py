"""A model's config: what of its tensors the optimizer refuses, and what FSDP would part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from dist_optim.doctor.asking import refusal_of
from dist_optim.doctor.finding import Change, Finding, Rule, applied
from dist_optim.doctor.rules.launching import plugin_of
from dist_optim.doctor.subject import Subject
from dist_optim.errors import DistOptimError
from dist_optim.specs.catalogue import missing_packages

__all__ = ["LLAMA", "RULES"]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "is_decoder": True,
}
MODES: tuple[dict[str, Any], ...] = (
    {"quantize": False, "fused": False, "master_weight_bits": None},
    {"proj_type": "std"},
    {"amsgrad": False},
    {"loss_scale": 1024.0},
)
"""Hyperparameters of upstream's modes that run where others do not; the first that is taken is the patch."""
FROM_CONFIG = {"num_embeds": "hidden_size", "num_heads": "num_attention_heads"}
"""Hyperparameters that say again what the model's config says."""


def _find_unknown(subject: Subject) -> Iterator[Finding]:
    if subject.model is not None and subject.meta_model() is None:
        kind = subject.model.get("model_type")
        yield Finding(
            code="model-unknown",
            reason=f"transformers makes no model of this config (model_type {kind!r}), so that nothing of it could be "
            "looked at. Give a config.json with a model_type that the installed transformers knows.",
            is_error=False,
        )


def _refused_tensors(subject: Subject) -> str:
    """What the build says of the model's tensors, on the device that the job will have."""
    import torch

    from dist_optim.building.composing import Rest, compose
    from dist_optim.exchange.routing import refuse_misfits
    from dist_optim.layouts.detect import detect

    spec = subject.spec
    if spec is None or spec.is_undescribed or spec.refusal or missing_packages(spec):
        return ""
    model = subject.meta_model() or torch.nn.Linear(4096, 4096, bias=False, device="meta")
    options = {key: value for key, value in subject.optim_args.items() if key in {one.name for one in spec.records()}}
    device = torch.device("cpu" if subject.is_on_cpu else "cuda")
    try:
        composed, groups, arguments = compose(
            model, spec, detect(model), options, target_modules=_targets(subject), rest=Rest(), takes_idle=False
        )
    except DistOptimError:
        return ""  # of other rules
    placed = [(one, composed.values_in(group, arguments)) for group in groups for one in group["params"]]
    on_device = [(replace(one, parameter=_as_on(device, one.parameter)), values) for one, values in placed]
    return refusal_of(lambda: refuse_misfits(composed, on_device, subject.num_processes > 1))


def _targets(subject: Subject) -> Any:
    from dist_optim.specs.registry import Trait

    asked = subject.arguments.get("optim_target_modules") or subject.optim_args.get("target_modules")
    is_low_rank = subject.spec is not None and Trait.LOW_RANK in subject.spec.traits
    return (asked or "all-linear") if is_low_rank else None


def _as_on(device: Any, parameter: Any) -> Any:
    """What is asked of a parameter, as if it were on another device than meta."""
    return SimpleNamespace(
        device=device, dtype=parameter.dtype, shape=parameter.shape, requires_grad=parameter.requires_grad
    )


def _find_tensors(subject: Subject) -> Iterator[Finding]:
    reason = _refused_tensors(subject)
    if not reason:
        return
    known = {one.name for one in subject.spec.records()} if subject.spec else set()
    config = subject.model or {}
    told = {key: config[entry] for key, entry in FROM_CONFIG.items() if entry in config}
    for mode in (told, *MODES):
        changes = tuple(Change(*subject.optim_args_path(key), value) for key, value in mode.items() if key in known)  # type: ignore[arg-type]
        if changes and not _refused_tensors(applied(subject, changes)):
            yield Finding(code="tensors-refused", reason=reason, changes=changes)
            return
    yield Finding(code="tensors-refused", reason=reason)


def _find_parted_ties(subject: Subject) -> Iterator[Finding]:
    model = subject.meta_model() if subject.strategy.startswith("fsdp") else None
    if model is None:
        return
    from dist_optim.integrations.transformers.ties import parted_ties, refuse_parted_ties

    plugin = plugin_of(subject)
    if reason := refusal_of(lambda: refuse_parted_ties(model, plugin)):
        _, settings = parted_ties(model, plugin)
        changes = [Change(*subject.fsdp_path(name), _as_written(subject, value)) for name, value in settings.items()]  # type: ignore[arg-type]
        yield Finding(code="parted-ties", reason=reason, changes=tuple(changes))


def _as_written(subject: Subject, value: Any) -> Any:
    """accelerate's file lists names in one text."""
    is_file = subject.fsdp_path("")[0] == "accelerate"
    return ",".join(value) if isinstance(value, list) and is_file else value


RULES: tuple[Rule, ...] = (
    Rule(code="model-unknown", find=_find_unknown, example={"model": {"model_type": "no_such_model"}}),
    Rule(
        code="tensors-refused",
        find=_find_tensors,
        example={"model": LLAMA, "arguments": {"output_dir": "out", "optim": "flash_adamw", "use_cpu": True}},
    ),
    Rule(
        code="parted-ties",
        find=_find_parted_ties,
        example={
            "model": BERT,
            "accelerate": {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "FSDP",
                "num_processes": 2,
                "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
            },
        },
    ),
)
