"""What launches a plan: an accelerate file, DeepSpeed's JSON and a script, made from the packaged ones."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_optim.errors import UsageError
from dist_optim.files import written_whole
from dist_optim.planning import shipped
from dist_optim.planning.engines import replicas_of
from dist_optim.planning.forecast import Forecast

__all__ = ["Launch", "launch_line", "write_launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a plan was asked for, and its launch needs to say again."""

    model: str
    """As the user named it."""
    batch: int = 0
    length: int = 0
    gradient_checkpointing: bool = False
    target_modules: tuple[str, ...] = ()
    optim_args: str = ""


def write_launch(found: Forecast, asked: Launch, directory: Path) -> list[Path]:
    """Write ``launch.sh``, ``accelerate.yaml`` and, under DeepSpeed, ``deepspeed.json``. Nothing is replaced.

    Args:
        found: The plan.
        asked: What it was made of.
        directory: A new folder, or an empty one.

    Raises:
        UsageError: The folder has files of these names, or cannot be written.
    """
    files = {"launch.sh": _script(found, asked), "accelerate.yaml": accelerate_yaml(found)}
    if found.strategy.startswith("zero"):
        files["deepspeed.json"] = (shipped.root() / f"configs/deepspeed/{found.strategy}.json").read_text("utf-8")
    if there := [name for name in files if (directory / name).exists()]:
        raise UsageError(f"{str(directory)!r} has {', '.join(there)} already. Name another folder.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with written_whole(directory / name) as draft:
                draft.write_text(text, encoding="utf-8")
        (directory / "launch.sh").chmod(0o755)
    except OSError as error:
        raise UsageError(f"{str(directory)!r} cannot be written: {error}.") from error
    return [directory / name for name in files]


def accelerate_yaml(found: Forecast) -> str:
    """The packaged file of the strategy, for these ranks and machines."""
    name = "ddp" if found.strategy == "one" else found.strategy
    text = (shipped.root() / f"configs/accelerate/{name}.yaml").read_text("utf-8")
    values: dict[str, Any] = {"num_processes": found.num_ranks, "num_machines": found.num_nodes}
    if found.precision == "fp32":
        values["mixed_precision"] = '"no"'
    if found.strategy == "one":
        values["distributed_type"] = '"NO"'
    if found.strategy == "hsdp":
        replicas = replicas_of("hsdp", found.num_ranks, found.num_nodes)
        values["parallelism_config_dp_replicate_size"] = replicas
        values["parallelism_config_dp_shard_size"] = found.num_ranks // replicas
    return f"# {_title(found)}\n" + _with_values(text, values)


def launch_line(found: Forecast, asked: Launch, config: str = "accelerate.yaml") -> str:
    """The command that starts the job; on several machines once on each, with MACHINE_RANK and MASTER_ADDR set."""
    words = ["accelerate", "launch", "--config_file", config]
    machines = []
    if found.num_nodes > 1:
        machines = ["--machine_rank", '"$MACHINE_RANK"', "--main_process_ip", '"$MASTER_ADDR"']
        machines += ["--main_process_port", "29500"]
        if found.strategy.startswith("zero"):
            machines += ["--deepspeed_multinode_launcher", "standard"]
    return " ".join([shlex.join(words), *machines, shlex.join(["train.py", *_flags(found, asked)])])


def _flags(found: Forecast, asked: Launch) -> list[str]:
    config = shipped.find_model_config(asked.model)
    is_file = config is not None or Path(asked.model).is_file()
    model = "--model_config" if is_file else "--model_name_or_path"
    flags = [model, str(config or (Path(asked.model).resolve() if is_file else asked.model))]
    flags += ["--optim", found.optimizer]
    if asked.target_modules or any(note.startswith("target_modules") for note in found.notes):
        flags += ["--optim_target_modules", *(asked.target_modules or ("all-linear",))]
    if asked.optim_args:
        flags += ["--optim_args", asked.optim_args]
    if found.precision == "mixed":
        flags += ["--bf16"]
    if asked.batch and asked.length:
        flags += ["--per_device_train_batch_size", str(asked.batch), "--block_size", str(asked.length)]
    if asked.gradient_checkpointing:
        flags += ["--gradient_checkpointing"]
    return [*flags, "--output_dir", f"runs/{found.optimizer}_{found.strategy}"]


def _script(found: Forecast, asked: Launch) -> str:
    json_too = "# The same by DeepSpeed's JSON, with torchrun: train.py --deepspeed deepspeed.json, and these flags.\n"
    return (
        f"#!/bin/sh\n# {_title(found)}\n{json_too if found.strategy.startswith('zero') else ''}"
        "# Your own text: --train_file; all flags: train.py --help. Flags of this script are added.\n"
        'set -e\ncd "$(dirname "$0")"\n[ -e train.py ] || dist-optim cp train.py .\n'
        f'exec {launch_line(found, asked)} "$@"\n'
    )


def _title(found: Forecast) -> str:
    ranks = f"{found.num_ranks} GPU{'s' * (found.num_ranks > 1)}"
    peak = f"{found.peak.max / (1 << 30):.1f} GiB on the fullest"
    return f"{found.model}, {found.optimizer} under {found.strategy} on {ranks}: {peak}, as planned by dist-optim."


def _with_values(text: str, values: Mapping[str, Any]) -> str:
    """Lines of a YAML file with other values; comments stay.

    Raises:
        UsageError: The file lacks a key.
    """
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^(\s*{key}:) \S+", lambda found, value=value: f"{found[1]} {value}", text)  # type: ignore[misc]
        if count != 1:
            raise UsageError(
                f"The packaged file has {key} {count} times, not once: it was edited. Install dist-optim again."
            )
    return text
