"""The command line of `launch/train.py`: three dataclasses, as flags, as one `.yaml` or `.json` file, or as both.

Reading has two parts, because `TrainArguments` looks for the rank's device and peers when it is made: `read_arguments`
gives plain values, which ranks compare first, and `make_arguments` the dataclasses. Every mistake is a `DistOptimError`
whose message says what to change; nothing is printed and no process exits from here.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_optim import parse_optim_args
from dist_optim.errors import UsageError
from dist_optim.integrations.transformers import TrainingArguments
from dist_optim.integrations.transformers.argument_ranges import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    RANGES,
    Range,
    check_ranges,
)
from dist_optim.integrations.transformers.arguments import read_optim_args
from dist_optim.integrations.transformers.command_line import make_dataclasses, read_flags
from dist_optim.integrations.transformers.deepspeed_flags import settle_deepspeed
from dist_optim.integrations.transformers.schedule_arguments import any_schedule
from dist_optim.planning import shipped
from dist_optim.schedulers import schedule_names

CONFIGS = shipped.root() / "configs"
OWN_FLAGS = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}
DATA_RANGES = {
    "block_size": Range(minimum=2),
    "validation_split_percentage": Range(above=0, below=100),
    "max_train_samples": COUNT,
    "max_eval_samples": COUNT,
}
TRAIN_RANGES = {
    **RANGES,
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(("max_grad_norm", "save_steps", "eval_delay", "dataloader_num_workers"), NOT_NEGATIVE),
    **dict.fromkeys(("save_total_limit", "eval_accumulation_steps"), COUNT),
    "label_smoothing_factor": FRACTION,
}


def described(default: Any, text: str) -> Any:
    """A field of a dataclass, and what --help says about it."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model to train, and how text becomes tokens."""

    model_name_or_path: str | None = described(None, "Fine-tune this checkpoint: a folder or a hub name.")
    model_config: str | None = described(
        None, "Train from scratch with this config.json; by default configs/models/llama_tiny.json."
    )
    tokenizer_name: str | None = described(
        None, "Tokenizer folder or hub name. Default: the checkpoint's own; one token a byte otherwise."
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path and self.model_config:
            raise UsageError("--model_name_or_path (fine-tune) and --model_config (from scratch) exclude each other.")
        if not self.model_name_or_path:
            self.model_config = self.model_config or str(CONFIGS / "models" / "llama_tiny.json")
        if self.model_config and not Path(self.model_config).is_file():
            known = ", ".join(sorted(str(path) for path in (CONFIGS / "models").glob("*.json")))
            raise UsageError(f"--model_config {self.model_config!r} is not a file. Give a config.json, as: {known}.")


@dataclass
class DataArguments:
    """Which text to train and evaluate on."""

    train_file: list[str] | None = described(None, "Text (.txt and others) or .jsonl files; globs are expanded.")
    validation_file: list[str] | None = described(
        None, "As --train_file. Default: the last part of the training blocks is held out."
    )
    dataset_name: str | None = described(None, "A dataset of the `datasets` library instead of files.")
    dataset_config_name: str | None = described(None, "The dataset's configuration.")
    text_column: str = described("text", "The field of a .jsonl line or dataset row that holds text.")
    validation_split_percentage: float = described(
        5.0, "Share of the blocks held out when the data has no validation part."
    )
    block_size: int = described(256, "Tokens a training sample.")
    max_train_samples: int | None = described(None, "Use the first N training blocks only.")
    max_eval_samples: int | None = described(None, "Use the first N validation blocks only.")

    def __post_init__(self) -> None:
        if self.train_file and self.dataset_name:
            raise UsageError("--train_file and --dataset_name exclude each other. Give one.")
        if self.validation_file and not self.train_file:
            raise UsageError("--validation_file needs --train_file. Give both, or neither.")
        check_ranges(self, DATA_RANGES, prefix="--")


@dataclass
class TrainArguments(TrainingArguments):
    """How to train: our `TrainingArguments`, with the defaults of a demonstration and checks of every number."""

    output_dir: str = described("", "Where the model, metrics, plots and summary go.")
    overwrite_output_dir: bool = described(
        False, "Replace the run that --output_dir holds, once this one has finished."
    )
    resume_from_checkpoint: str | None = described(
        None, "Go on from this checkpoint folder, or from the last one of --output_dir, if any: last."
    )
    optim: str = described("adamw_torch", "A registered optimizer; see `dist-optim list`.")
    lr_scheduler_type: str = described(
        "linear",
        f"One of: {', '.join(schedule_names())}; or a class of torch.optim.lr_scheduler. greedy and "
        "reduce_lr_on_plateau decide after each evaluation, by the validation loss.",
    )
    num_train_epochs: float = described(1.0, "Passes over the training blocks.")
    logging_steps: float = described(10, "A line of metrics every so many steps.")
    logging_first_step: bool = described(True, "A line of metrics for the first step, too.")
    logging_nan_inf_filter: bool = described(False, "Leave losses that are not finite out.")
    eval_strategy: str = described("steps", "Evaluate every --eval_steps steps, or: epoch, no.")
    eval_steps: float | None = described(100, "Evaluate every so many steps, and at the end.")
    eval_on_start: bool = described(True, "Evaluate before the first step, too.")
    save_steps: float = described(500, "A checkpoint every so many steps, as OUTPUT_DIR/checkpoint-STEP; 0 for none.")
    rehearse: bool = described(
        True, "After the first step, save, load again and compare, so that a later save will not be the first to fail."
    )
    telemetry: bool = described(
        False,
        "Say in each line of metrics what the optimizer did in that step: update ratios, times, bytes.",
    )
    ddp_find_unused_parameters: bool | None = described(False, "Let DDP look for parameters that a step leaves out.")
    disable_tqdm: bool = described(False, "No progress bar.")

    def __post_init__(self) -> None:
        mine: Any = self  # mypy does not follow transformers
        if not self.output_dir:
            raise UsageError("--output_dir is missing, or empty. Name a folder for the results.")
        check_ranges(self, TRAIN_RANGES, prefix="--")
        if self.max_steps != -1:  # -1: as many as --num_train_epochs says
            check_ranges(self, {"max_steps": COUNT}, prefix="--")
        if not torch.accelerator.is_available():
            mine.use_cpu = True  # or accelerate forms no process group
        if str(mine.fsdp).lower() in ("true", "false"):  # from the command line
            mine.fsdp = str(mine.fsdp).lower() == "true"
        if self.save_steps == 0:
            mine.save_strategy = "no"
        mine.data_seed = self.seed if mine.data_seed is None else mine.data_seed
        _refuse_twice(mine.optim_args)
        with any_schedule(mine):
            super().__post_init__()


def _refuse_twice(optim_args: Any) -> None:
    """Raise `UsageError` where `--optim_args` sets what has a flag of its own."""
    given = read_optim_args(optim_args) or {}
    for key in sorted((given if isinstance(given, dict) else parse_optim_args(given)).keys() & OWN_FLAGS.keys()):
        raise UsageError(f"--optim_args sets {key}, which has a flag of its own. Use {OWN_FLAGS[key]}.")


KINDS = (ModelArguments, DataArguments, TrainArguments)


def read_arguments(argv: Sequence[str]) -> Namespace:
    """The values of all arguments by name, and in ``given`` the names of those that the user set.

    Raises:
        UsageError: An argument is unknown (the nearest known one is named), or its value of a wrong type.
    """
    return read_flags(KINDS, argv)


def make_arguments(asked: Namespace) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """The dataclasses, checked, and DeepSpeed's configuration settled with them.

    Raises:
        DistOptimError: A value is out of range, or contradicts another.
    """
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"  # the model in the output folder needs it
    settle_deepspeed(asked, asked.given)
    model, data, train = make_dataclasses(KINDS, asked)
    return model, data, train
