"""What is examined: a script's arguments, accelerate's and DeepSpeed's files, a model's config, in any combination."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dist_optim.errors import DistOptimError, UsageError
from dist_optim.specs.hyperparameters import parse_optim_args
from dist_optim.specs.registry import OptimizerSpec, get_spec

__all__ = ["Environment", "Subject", "kind_of"]

OURS = "dist_optim."
OFFLOADS = ("offload_optimizer", "offload_param")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """This machine, as far as a rule looks at it; ``doctor.machine`` reads it."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Of installed packages, by their pip names."""
    has_gpu: bool = False
    """Whether the machine has one, whatever torch sees."""
    torch_cuda: str | None = None
    """The CUDA that torch was built for; None for a build without."""
    sees_gpu: bool = False
    """Whether torch can use one."""
    has_nccl: bool = False
    output_disk: str = ""
    """The kind of file system on which the output folder lies; empty where nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Parsed, and not checked: what is wrong with the values is for the rules."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Flags of the script that the user set, by name."""
    accelerate: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    environment: Environment = field(default_factory=Environment)
    files: Mapping[str, Path] = field(default_factory=dict)
    """Where each part was read from, by the part's name."""

    @classmethod
    def of(cls, **parts: Any) -> Subject:
        """From plain data; ``environment`` may be a dict too."""
        environment = parts.pop("environment", Environment())
        if isinstance(environment, Mapping):
            environment = Environment(**environment)
        return cls(environment=environment, **parts)

    # Strategy -----------------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> str:
        """``"fsdp1"``, ``"fsdp2"``, ``"deepspeed"`` or ``""``: DDP, or one process."""
        kind = str((self.accelerate or {}).get("distributed_type", "")).upper()
        if self.deepspeed is not None or kind == "DEEPSPEED":
            return "deepspeed"
        if kind == "FSDP" or self._fsdp_is_asked_for_by_flags:
            return f"fsdp{self.fsdp('version', 1)}"
        return ""

    @property
    def num_processes(self) -> int:
        """As the launcher's file says; 1 where nothing does."""
        return int((self.accelerate or {}).get("num_processes", 1))

    @property
    def _fsdp_is_asked_for_by_flags(self) -> bool:
        return str(self.arguments.get("fsdp", "")).lower() not in ("", "false", "none", "[]")

    def fsdp(self, name: str, default: Any = None) -> Any:
        """A setting of FSDP by the name that it has without ``fsdp_``, from wherever it is set."""
        return self._fsdp_settings().get(self.fsdp_path(name)[1][-1], default)

    def fsdp_path(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The part and the place where such a setting is written."""
        if (self.accelerate or {}).get("distributed_type") == "FSDP":
            return "accelerate", ("fsdp_config", f"fsdp_{name}")
        return "arguments", ("fsdp_config", name)

    def _fsdp_settings(self) -> Mapping[str, Any]:
        part, path = self.fsdp_path("")
        return _mapping((getattr(self, part) or {}).get(path[0]))

    @property
    def is_on_cpu(self) -> bool:
        """Whether the job asks for the CPU, or has nothing else."""
        asked = self.arguments.get("use_cpu") or (self.accelerate or {}).get("use_cpu")
        return bool(asked) or not self.environment.sees_gpu

    # Optimizer ----------------------------------------------------------------------------------------------------

    @property
    def json_optimizer(self) -> Mapping[str, Any]:
        """The section of DeepSpeed's JSON that names an optimizer."""
        return _mapping((self.deepspeed or {}).get("optimizer"))

    @property
    def optim(self) -> str:
        """The name that is asked for; empty where none is."""
        return str(self.arguments.get("optim") or self.json_optimizer.get("type") or "").removeprefix(OURS)

    @property
    def spec(self) -> OptimizerSpec | None:
        """Of that name, or of what transformers' name stands for; None where it is no registered one."""
        from dist_optim.integrations.transformers.names import registered_name

        try:
            return get_spec(registered_name(self.optim) or self.optim) if self.optim else None
        except DistOptimError:
            return None

    @property
    def optim_args(self) -> dict[str, Any]:
        """Hyperparameters and options of the optimizer, of the flag or the JSON; empty where they cannot be read."""
        try:
            given = self.arguments.get("optim_args")
            own = dict(given) if isinstance(given, Mapping) else parse_optim_args(given)
        except DistOptimError:
            return {}
        return own or {key: one for key, one in _mapping(self.json_optimizer.get("params")).items() if one != "auto"}

    def optim_args_path(self, key: str) -> tuple[str, tuple[str, ...]]:
        """The part and the place where one of them is written."""
        in_json = not self.arguments.get("optim_args") and key in _mapping(self.json_optimizer.get("params"))
        return ("deepspeed", ("optimizer", "params", key)) if in_json else ("arguments", ("optim_args", key))

    # As run-time code takes it ------------------------------------------------------------------------------------

    def namespace(self) -> Any:
        """The flags as an object, with transformers' defaults for those that are not set."""
        return SimpleNamespace(**{**_defaults(), **self.arguments})

    @property
    def deepspeed_config(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration: the file, or what accelerate's file says of it; None under another strategy."""
        if self.deepspeed is not None or self.strategy != "deepspeed":
            return self.deepspeed
        own = _mapping((self.accelerate or {}).get("deepspeed_config"))
        zero: dict[str, Any] = {"stage": int(own.get("zero_stage", 2))}
        for key in OFFLOADS:
            zero[key] = {"device": own.get(f"{key}_device", "none")}
        half = (self.accelerate or {}).get("mixed_precision")
        return {"zero_optimization": zero, **({str(half): {"enabled": True}} if half in ("fp16", "bf16") else {})}

    def meta_model(self) -> Any:
        """The model of the config, without memory; None without a config, or where transformers cannot make it."""
        return None if self.model is None else _meta_model(json.dumps(self.model, sort_keys=True))


@functools.lru_cache(maxsize=4)
def _meta_model(text: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    entries = json.loads(text)
    try:
        config = AutoConfig.for_model(entries.pop("model_type"), **entries)
        with torch.device("meta"):
            try:
                return AutoModelForCausalLM.from_config(config)
            except ValueError:  # of another task
                return AutoModel.from_config(config)
    except Exception:  # whatever a model's constructor fails with: the rule on models says so
        return None


@functools.cache
def _defaults() -> dict[str, Any]:
    from dataclasses import MISSING, fields

    import transformers

    found = {one.name: one.default for one in fields(transformers.TrainingArguments) if one.default is not MISSING}
    return {**found, "optim": transformers.TrainingArguments.default_optim}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def kind_of(data: Any, path: Path) -> str:
    """Which part of a subject a file is, by its content.

    Raises:
        UsageError: It holds no mapping.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{str(path)!r} holds no mapping of names to values.")
    if "compute_environment" in data or "distributed_type" in data:
        return "accelerate"
    if "model_type" in data:
        return "model"
    deepspeeds = ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "steps_per_print")
    return "deepspeed" if any(key in data for key in deepspeeds) else "arguments"


def files_to_read(names: Sequence[Path]) -> list[Path]:
    """Folders stand for the ``config.json`` inside."""
    return [name / "config.json" if name.is_dir() else name for name in names]
