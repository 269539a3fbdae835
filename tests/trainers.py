"""Training through the Trainer's door on the ranks of a pool: a job under each strategy, and what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import ParallelismConfig
from end_to_end import BATCH, batch, make_llama
from fresh import own_libraries
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from dist_optim.integrations.transformers import Trainer, TrainingArguments

STEPS = 6
FSDP = {"fsdp": True}
ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "steps_per_print": 10**9}
STRATEGIES: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {},
    "fsdp1": {**FSDP, "fsdp_config": {"version": 1, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "fsdp2": {**FSDP, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "hsdp": {
        **FSDP,
        "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        "parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
    },
    **{
        f"zero{stage}": {
            "deepspeed": {
                **ZERO,
                "zero_optimization": {"stage": stage}
                | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}),
            }
        }
        for stage in (0, 1, 2, 3)
    },
}
"""What a user sets in TrainingArguments for each strategy."""

LOW_RANK = {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=8, update_proj_gap=3"}
SETTINGS: dict[str, dict[str, Any]] = {
    "adam_mini": {"optim_args": "num_embeds=33, num_heads=11"},
    "apollo_adamw": LOW_RANK,
    "apollo_mini": {"optim_target_modules": ["attn", "mlp"], "optim_args": {"rank": 1, "update_proj_gap": 3}},
    "galore_adafactor": LOW_RANK,
    "galore_adamw": LOW_RANK,
    "galore_adamw_8bit": LOW_RANK,
    **{
        name: {"optim_args": "quantize=False, fused=False, master_weight_bits=None"}
        for name in ("flash_adam", "flash_adamw", "flash_lion", "flash_sgd", "flash_sgdw")
    },
}
"""What a name needs besides a learning rate."""


@dataclass(frozen=True)
class Job:
    """One run of a Trainer."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """More TrainingArguments."""
    make_model: Callable[[], nn.Module] = make_llama
    kind: type[Any] = Trainer
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of the Trainer itself."""
    resume: Any = None


@dataclass(frozen=True)
class Outcome:
    weights: dict[str, Tensor]
    """What ``save_model`` wrote at the end."""
    logs: list[dict[str, float]]

    def all(self, key: str) -> list[float]:
        return [log[key] for log in self.logs if key in log]


class Blocks(Dataset[dict[str, Tensor]]):
    """The rows of ``end_to_end.batch(0)``, then of ``batch(1)``, ...: read in order, step ``n`` sees ``batch(n)``."""

    def __init__(self, num_batches: int = STEPS, start: int = 0) -> None:
        self.rows = torch.cat([batch(start + number) for number in range(num_batches)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """What the libraries keep for the process, and the environment that accelerate writes to, end with it.

    FSDP saves whole weights, in model.safetensors: older versions save shards unless told.
    """
    with mock.patch.dict(os.environ, FSDP_STATE_DICT_TYPE="FULL_STATE_DICT"), own_libraries():
        yield


def arguments_of(
    job: Job, strategy: str, directory: str | Path, kind: type[Any] = TrainingArguments, **more: Any
) -> Any:
    world_size = 1 if strategy == "alone" or not dist.is_initialized() else dist.get_world_size()
    accumulation = job.settings.get("gradient_accumulation_steps", 1)
    settings = {
        "output_dir": str(directory),
        "optim": job.name,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // world_size // accumulation,
        "per_device_eval_batch_size": BATCH // world_size,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **SETTINGS.get(job.name, {}),
        **job.settings,
        **STRATEGIES[strategy],
        **more,
    }
    return kind(**settings)


def train(
    job: Job, strategy: str, directory: str | Path, arguments: type[Any] = TrainingArguments, **more: Any
) -> Outcome:
    """Run the job on this rank, and read back what it saved; ``more`` goes into the arguments last."""
    with fresh_accelerate():
        settings = arguments_of(job, strategy, directory, arguments, **more)
        torch.manual_seed(0)
        trainer = job.kind(
            job.make_model(), settings, train_dataset=Blocks(), eval_dataset=Blocks(1, start=1000), **job.options
        )
        trainer.train(resume_from_checkpoint=job.resume)
        logs = list(trainer.state.log_history)
        end = Path(directory) / "end"
        trainer.save_model(str(end))
        trainer.accelerator.wait_for_everyone()
        return Outcome(load_file(end / "model.safetensors"), logs)


def gap_between(one: Outcome, other: Outcome) -> float:
    """The largest difference between two runs' weights."""
    assert one.weights.keys() == other.weights.keys()
    return max((one.weights[name] - other.weights[name]).abs().max().item() for name in one.weights)
