"""DeepSpeed's configuration and the flags of a Trainer's script as one, and refused where they contradict.

The configuration comes from ``--deepspeed`` (a file, or JSON itself), or from the launcher (``accelerate launch`` with
a file of DeepSpeed's). transformers fills in what it calls "auto"; here, what it leaves out comes from the flags, too,
where DeepSpeed would take a default of its own without a word, and what only it says becomes the flag's value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dist_optim.errors import UsageError

__all__ = ["OF_OPTIMIZER", "PLACES", "refuse_schedule_section", "settle_deepspeed", "settle_value"]

LAUNCHER_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
PLACES = {
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "bf16": "bf16.enabled",
    "fp16": "fp16.enabled",
}
OF_OPTIMIZER = {
    "optim": "optimizer.type",
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
}


def settle_deepspeed(asked: Any, given: Collection[str]) -> None:
    """Give ``asked.deepspeed`` the whole configuration, and both the same values; nothing where there is no file.

    Args:
        asked: The flags' values by name, to be changed in place.
        given: The names of those that the user set.

    Raises:
        UsageError: The configuration cannot be read, has a schedule, or contradicts a flag that was given.
    """
    path, launched = asked.deepspeed, os.environ.get(LAUNCHER_FILE)
    if path and launched and launched != path:
        raise UsageError(
            f"--deepspeed {path!r} is not the file of the accelerate configuration, {launched!r}. Leave the flag out, "
            "or start with torchrun."
        )
    source = path or launched
    if source:
        name = "--deepspeed" if source.startswith("{") else source
        asked.deepspeed = _settled(_read(source), asked, given, name)


def _settled(config: dict[str, Any], asked: Any, given: Collection[str], source: str) -> dict[str, Any]:
    refuse_schedule_section(config, source)
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        asked.bf16, given = True, {*given, "bf16"}
    for flag, place in {**PLACES, **(OF_OPTIMIZER if "optimizer" in config else {})}.items():
        settle_value(config, place, asked, flag, flag in given, source)
    params = config.get("optimizer", {}).get("params", {})
    if isinstance(params.get("betas"), list):
        asked.adam_beta1, asked.adam_beta2 = params["betas"][:2]
    if isinstance(params.get("eps"), float):
        asked.adam_epsilon = params["eps"]
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
    return config


def refuse_schedule_section(config: dict[str, Any], source: str) -> None:
    """A schedule is asked for by the flags.

    Raises:
        UsageError: The configuration asks for one, too.
    """
    if "scheduler" in config:
        raise UsageError(f'{source} has a "scheduler" section. Remove it, and use --lr_scheduler_type.')


def settle_value(config: dict[str, Any], place: str, asked: Any, flag: str, is_given: bool, source: str) -> None:
    """One value: the flag's in both, or the configuration's in both.

    Raises:
        UsageError: A flag that was given contradicts the configuration.
    """
    *parents, key = place.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    value, wanted = config.get(key, "auto"), getattr(asked, flag)
    if flag == "optim":
        value = str(value).removeprefix("dist_optim.")
    if value == "auto":
        config[key] = wanted
    elif is_given and value != wanted:
        raise UsageError(f"--{flag} {wanted} contradicts {source}, where {place} is {value}. Give one of them.")
    else:
        setattr(asked, flag, value)


def _read(path: str) -> dict[str, Any]:
    """The file's content; JSON text itself is one, too."""
    try:
        config = json.loads(path if path.startswith("{") else Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"The DeepSpeed configuration {path!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"The DeepSpeed configuration {path!r} must hold one JSON object.")
    return config
