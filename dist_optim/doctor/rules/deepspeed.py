"""DeepSpeed's configuration: what its engine would be refused for, and where it contradicts the script's flags."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_optim.doctor.asking import refusal_of
from dist_optim.doctor.finding import TAKE_OUT, Change, Finding, Rule, in_deepspeed
from dist_optim.doctor.subject import OFFLOADS, Subject
from dist_optim.integrations.deepspeed.limits import LIMITS, Limit, setup_of_json

__all__ = ["RULES"]

ZERO = "zero_optimization"
OFFLOAD = {"device": "cpu"}
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "engine": {"hybrid_engine": {"enabled": True}},
    "tensor-parallel": {"tensor_parallel": {"autotp_size": 2}},
    "autocast": {"torch_autocast": {"enabled": True}},
    "deepcompile": {"compile": {"deepcompile": True}},
    "fp16-without-zero": {"fp16": {"enabled": True}, ZERO: {"stage": 0}},
    "elastic-checkpoint": {ZERO: {"stage": 2, "elastic_checkpoint": True}},
    "zenflow": {ZERO: {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
    "offload-param": {ZERO: {"stage": 3, "offload_param": OFFLOAD}},
    "offload-nvme": {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "disk"}}},
    "offload-ratio": {ZERO: {"stage": 3, "offload_optimizer": {**OFFLOAD, "ratio": 0.5}}},
    "super-offload": {ZERO: {"stage": 3, "offload_optimizer": {**OFFLOAD, "super_offload": True}}},
    "hierarchical-partition": {ZERO: {"stage": 3, "zero_hpz_partition_size": 2}},
    "quantized-communication": {ZERO: {"stage": 3, "zero_quantized_weights": True}},
}
BATCH = {"train_micro_batch_size_per_gpu": 4}


def _of_limit(limit: Limit) -> Rule:
    code = f"deepspeed-{limit.code}"

    def find(subject: Subject) -> Iterator[Finding]:
        config = subject.deepspeed_config
        setup = None if config is None else setup_of_json(config)
        if setup is not None and limit.is_met(setup):
            reason = limit.reason.replace("{engine}", setup.engine)
            yield Finding(code=code, reason=reason, changes=_changes(subject, limit.patch))

    return Rule(code=code, find=find, example={"deepspeed": {**BATCH, **EXAMPLES[limit.code]}})


def _changes(subject: Subject, patch: Mapping[str, Any]) -> tuple[Change, ...]:
    """In the file where it is said: accelerate's own has other names for a few entries."""
    if subject.deepspeed is not None:
        found = in_deepspeed(patch)
        return tuple(one for one in found if one.value is not TAKE_OUT or _is_there(subject.deepspeed, one.path))
    names = {f"{ZERO}.stage": "zero_stage", **{f"{ZERO}.{key}": f"{key}_device" for key in OFFLOADS}}
    names |= {f"{ZERO}.{key}.device": f"{key}_device" for key in OFFLOADS}
    return tuple(
        Change("accelerate", ("deepspeed_config", names[place]), "none" if value is None else value)
        for place, value in patch.items()
        if place in names
    )


def _is_there(config: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(config, Mapping) or key not in config:
            return False
        config = config[key]
    return True


def _find_schedule(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.deepspeed_flags import refuse_schedule_section

    config = subject.deepspeed
    if config is None or not subject.arguments:
        return
    if reason := refusal_of(lambda: refuse_schedule_section(config, _name(subject))):
        yield Finding(code="deepspeed-schedule", reason=reason, changes=in_deepspeed({"scheduler": None}))


def _find_contradictions(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.deepspeed_flags import OF_OPTIMIZER, PLACES, settle_value

    config = subject.deepspeed
    if config is None:
        return
    for flag, place in {**PLACES, **(OF_OPTIMIZER if "optimizer" in config else {})}.items():
        if flag not in subject.arguments:
            continue
        asked = subject.namespace()

        def settle(flag: str = flag, place: str = place, asked: Any = asked) -> None:
            settle_value(copy.deepcopy(config), place, asked, flag, True, _name(subject))

        if reason := refusal_of(settle):
            yield Finding(code="deepspeed-contradiction", reason=reason, changes=in_deepspeed({place: "auto"}))


def _find_two_optimizers(subject: Subject) -> Iterator[Finding]:
    from dist_optim.integrations.transformers.deepspeed import refuse_two_optimizers

    named, asked = subject.json_optimizer.get("type"), subject.namespace()
    if named is None or not subject.arguments:
        return
    default = Subject().namespace().optim
    if reason := refusal_of(lambda: refuse_two_optimizers(asked.optim, asked.optim_args, str(named), default)):
        yield Finding(code="two-optimizers", reason=reason, changes=in_deepspeed({"optimizer": None}))


def _find_batch(subject: Subject) -> Iterator[Finding]:
    config = subject.deepspeed or {}
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    steps = config.get("gradient_accumulation_steps", 1)
    if subject.accelerate is None or not all(isinstance(one, int) for one in (total, micro, steps)):
        return
    product = int(micro or 0) * int(steps) * subject.num_processes
    if total != product:
        yield Finding(
            code="deepspeed-batch",
            reason=f'{_name(subject)} sets "train_batch_size": {total}, and the other numbers give {product} on '
            f"{subject.num_processes} processes: DeepSpeed does not start. Leave it out: it finds the product itself.",
            changes=in_deepspeed({"train_batch_size": None}),
        )


def _name(subject: Subject) -> str:
    return str(subject.files.get("deepspeed", "DeepSpeed's configuration"))


RULES: tuple[Rule, ...] = (
    *(_of_limit(limit) for limit in LIMITS if limit.code in EXAMPLES),
    Rule(
        code="deepspeed-schedule",
        find=_find_schedule,
        example={
            "deepspeed": {**BATCH, "scheduler": {"type": "WarmupLR", "params": {}}},
            "arguments": {"output_dir": "out"},
        },
    ),
    Rule(
        code="deepspeed-contradiction",
        find=_find_contradictions,
        example={
            "deepspeed": {**BATCH, "gradient_clipping": 0.5, ZERO: {"stage": 2}},
            "arguments": {"output_dir": "out", "max_grad_norm": 1.0},
        },
    ),
    Rule(
        code="two-optimizers",
        find=_find_two_optimizers,
        example={
            "deepspeed": {**BATCH, "optimizer": {"type": "lion", "params": {"lr": 1e-3}}},
            "arguments": {"output_dir": "out", "optim": "adafactor"},
        },
    ),
    Rule(
        code="deepspeed-batch",
        find=_find_batch,
        example={
            "deepspeed": {**BATCH, "train_batch_size": 6},
            "accelerate": {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": 2},
        },
    ),
)
