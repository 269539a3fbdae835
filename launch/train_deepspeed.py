"""DeepSpeed's configuration and the flags of `launch/train.py` as one, and refused where they contradict.

The configuration comes from `--deepspeed FILE`, or from the launcher (`accelerate launch` with a DeepSpeed file). What
it leaves out or calls "auto" comes from the flags; what only it says becomes the flag's value.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from train_arguments import UsageError

LAUNCHER_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
SAME = {
    "per_device_train_batch_size": ("train_micro_batch_size_per_gpu",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "max_grad_norm": ("gradient_clipping",),
    "bf16": ("bf16", "enabled"),
    "fp16": ("fp16", "enabled"),
}
OPTIMIZER = {"learning_rate": ("optimizer", "params", "lr"), "weight_decay": ("optimizer", "params", "weight_decay")}


def settle_deepspeed(asked: Namespace) -> None:
    """Give ``asked.deepspeed`` the whole configuration, and both the same values; nothing where none is asked for.

    Raises:
        UsageError: The configuration cannot be read, or contradicts a flag.
    """
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"  # the model in the output folder needs it
    path, launched = asked.deepspeed, os.environ.get(LAUNCHER_FILE)
    if path and launched and launched != path:
        raise UsageError(
            f"--deepspeed {path!r} is not the file of the accelerate configuration, {launched!r}. Leave the flag out, "
            "or start with torchrun."
        )
    path = path or launched
    if path:
        config = _read(path)
        settle(config, asked, path)
        asked.deepspeed = config


def settle(config: dict[str, Any], asked: Namespace, source: str) -> None:
    """Make the configuration and the flags say the same, in place.

    Raises:
        UsageError: A flag that was given contradicts the configuration, or that has a schedule.
    """
    given = set(asked.given)
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        asked.bf16, given = True, given | {"bf16"}
    section = config.get("optimizer")
    for flag, place in {**SAME, **(OPTIMIZER if section is not None else {})}.items():
        _settle_one(config, asked, source, flag, place, flag in given)
    if section is not None:
        _settle_optimizer(section, asked, source, "optim" in given)
    if "scheduler" in config:
        raise UsageError(f'{source} has a "scheduler" section. Remove it, and use --lr_scheduler_type.')
    batch = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
    total = batch * int(os.environ.get("WORLD_SIZE", "1"))
    # DeepSpeed finds the product itself; where a model is made under zero.Init, it would compare it with one rank's.
    named = config.pop("train_batch_size", "auto")
    if named not in (total, "auto"):
        raise UsageError(
            f'{source} sets "train_batch_size": {named}, and the other numbers give {total}. Remove it, or write '
            '"auto".'
        )
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def _settle_one(
    config: dict[str, Any], asked: Namespace, source: str, flag: str, place: tuple[str, ...], is_given: bool
) -> None:
    *parents, key = place
    for parent in parents:
        config = config.setdefault(parent, {})
    value, wanted = config.get(key, "auto"), getattr(asked, flag)
    if value == "auto":
        config[key] = wanted
    elif is_given and value != wanted:
        name = ".".join(place)
        raise UsageError(f"--{flag} {wanted} contradicts {source}, where {name} is {value}. Give one of them.")
    else:
        setattr(asked, flag, value)


def _settle_optimizer(section: dict[str, Any], asked: Namespace, source: str, is_given: bool) -> None:
    named, params = str(section.get("type", "")).removeprefix("dist_optim."), section["params"]
    if is_given and asked.optim != named:
        raise UsageError(f"--optim {asked.optim} contradicts {source}, whose optimizer is {named}. Give one of them.")
    asked.optim = named
    if isinstance(params.get("betas"), list):
        asked.adam_beta1, asked.adam_beta2 = params["betas"][:2]
    if isinstance(params.get("eps"), float):
        asked.adam_epsilon = params["eps"]


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"The DeepSpeed configuration {path!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"The DeepSpeed configuration {path!r} must hold one JSON object.")
    return config
