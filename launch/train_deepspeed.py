"""DeepSpeed under `launch/train.py`: its configuration and the flags as one, and refused where they contradict.

The configuration comes from `--deepspeed FILE` (with `deepspeed launch/train.py` or `torchrun`), or from the launcher
(`accelerate launch` with a DeepSpeed configuration). What it leaves out or calls "auto" comes from the flags; what only
it says becomes the flag's value; where a flag that was given says otherwise, the job is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from dist_optim.integrations.cpu_rehearsal import deepspeed_arguments
from train_arguments import TrainArguments, UsageError

__all__ = ["accelerator_arguments", "is_asked_for", "leave_out", "settle"]

LAUNCHER_FILE, LAUNCHER_ASKS = "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_DEEPSPEED"

# Flag, and where the configuration has the same.
SAME = {
    "per_device_train_batch_size": ("train_micro_batch_size_per_gpu",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "max_grad_norm": ("gradient_clipping",),
    "bf16": ("bf16", "enabled"),
}
OPTIMIZER = {"learning_rate": ("optimizer", "params", "lr"), "weight_decay": ("optimizer", "params", "weight_decay")}


def is_asked_for(arguments: TrainArguments | None) -> bool:
    """Whether this job is DeepSpeed's."""
    asked = os.environ.get(LAUNCHER_ASKS, "false").lower() in ("1", "true", "yes")
    return asked or (arguments is not None and arguments.deepspeed is not None)


def accelerator_arguments(arguments: TrainArguments) -> dict[str, Any]:
    """Keywords for `Accelerator`: the configuration as a plugin and, on a machine without a GPU, the CPU rehearsal.

    The flags in ``arguments`` take the values that only the configuration gives.

    Raises:
        UsageError: The configuration cannot be read, or contradicts a flag.
        UnsupportedError: The CPU is asked for on a machine with an accelerator that is not hidden.
    """
    on_cpu = arguments.use_cpu or not torch.accelerator.is_available()
    found = deepspeed_arguments() if on_cpu else {}
    from accelerate.utils import DeepSpeedPlugin

    path = arguments.deepspeed or os.environ.get(LAUNCHER_FILE)
    if arguments.deepspeed and os.environ.get(LAUNCHER_FILE, arguments.deepspeed) != arguments.deepspeed:
        raise UsageError(
            f"--deepspeed {arguments.deepspeed!r} is not the file of the accelerate configuration, "
            f"{os.environ[LAUNCHER_FILE]!r}. Leave the flag out, or start with torchrun."
        )
    if path is None:  # the fields of the accelerate configuration itself
        plugin = DeepSpeedPlugin()
        settle(plugin.deepspeed_config, arguments, "the accelerate configuration")
        plugin.gradient_accumulation_steps = arguments.gradient_accumulation_steps
    else:
        config = _read(path)
        settle(config, arguments, path)
        plugin = DeepSpeedPlugin(hf_ds_config=config)
    half = next((kind for kind in ("bf16", "fp16") if plugin.deepspeed_config.get(kind, {}).get("enabled")), "no")
    return {**found, "deepspeed_plugin": plugin, "mixed_precision": half}


def leave_out() -> None:
    """Forget that the launcher asked for DeepSpeed: the job will only end."""
    os.environ.pop(LAUNCHER_ASKS, None)


def settle(config: dict[str, Any], arguments: TrainArguments, source: str) -> None:
    """Make the configuration and the flags say the same, in place.

    Raises:
        UsageError: A flag that was given contradicts the configuration, or the configuration asks for what this
            script does not do.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        arguments.bf16, arguments.given = True, arguments.given | {"bf16"}
    section = config.get("optimizer")
    for flag, place in {**SAME, **(OPTIMIZER if section is not None else {})}.items():
        _settle_one(config, arguments, source, flag, place)
    if section is not None:
        _settle_name(section, arguments, source)
    if "scheduler" in config:
        raise UsageError(f'{source} has a "scheduler" section. Remove it, and use --lr_scheduler_type.')
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    total = batch * int(os.environ.get("WORLD_SIZE", "1"))
    if config.setdefault("train_batch_size", total) not in (total, "auto"):
        raise UsageError(
            f'{source} sets "train_batch_size": {config["train_batch_size"]}, and the other numbers give {total}. '
            'Remove it, or write "auto".'
        )
    config["train_batch_size"] = total
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # the model in the output folder needs them


def _settle_one(
    config: dict[str, Any], arguments: TrainArguments, source: str, flag: str, place: tuple[str, ...]
) -> None:
    *parents, key = place
    for parent in parents:
        config = config.setdefault(parent, {})
    value, wanted = config.get(key, "auto"), getattr(arguments, flag)
    is_given = flag in arguments.given
    if value == "auto":
        config[key] = wanted
    elif is_given and value != wanted:
        name = ".".join((*parents, key))
        raise UsageError(f"--{flag} {wanted} contradicts {source}, where {name} is {value}. Give one of them.")
    else:
        setattr(arguments, flag, value)


def _settle_name(section: dict[str, Any], arguments: TrainArguments, source: str) -> None:
    named = str(section.get("type", "")).removeprefix("dist_optim.")
    if "optim" in arguments.given and arguments.optim != named:
        raise UsageError(
            f"--optim {arguments.optim} contradicts {source}, whose optimizer is {named}. Give one of them."
        )
    arguments.optim = named


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"The DeepSpeed configuration {path!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"The DeepSpeed configuration {path!r} must hold one JSON object.")
    return config
