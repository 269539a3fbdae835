"""The command line of `launch/train.py`: dataclasses read by `HfArgumentParser`, named as in `TrainingArguments`.

A run is a line of flags, or one `.json` / `.yaml` file with the same names as keys. Every mistake is a `UsageError`
whose message says what to change; nothing is printed and no process exits from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from dist_optim.errors import DistOptimError
from dist_optim.schedulers import resolve_schedule, schedule_names

__all__ = ["DataArguments", "ModelArguments", "TrainArguments", "UsageError", "parse_arguments"]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class UsageError(DistOptimError, ValueError):
    """The command line, or something that it names, cannot be used."""


@dataclass
class ModelArguments:
    """Which model to train, and how text becomes tokens."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this checkpoint: a folder or a hub name."}
    )
    model_config: str | None = field(
        default=None,
        metadata={"help": "Train from scratch with this config.json; by default configs/models/llama_tiny.json."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer folder or hub name. Default: the checkpoint's own; one token a byte from scratch."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in backward: less memory, more time."}
    )

    def check(self) -> None:
        """Raise `UsageError` when the choice of model contradicts itself or names a missing file."""
        if self.model_name_or_path and self.model_config:
            raise UsageError(
                "--model_name_or_path (fine-tune) and --model_config (train from scratch) exclude each other. Give one."
            )
        if self.model_name_or_path is None and self.model_config is None:
            self.model_config = str(CONFIGS / "models" / "llama_tiny.json")
        if self.model_config is not None and not Path(self.model_config).is_file():
            known = ", ".join(sorted(str(path) for path in (CONFIGS / "models").glob("*.json")))
            raise UsageError(
                f"--model_config {self.model_config!r} is not a file. Give a config.json, for example: {known}."
            )


@dataclass
class DataArguments:
    """Which text to train and evaluate on."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text (.txt and others) or .jsonl files; globs are expanded."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "As --train_file. Default: the last part of the training blocks is held out."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset of the `datasets` library instead of files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    text_column: str = field(
        default="text", metadata={"help": "The field of a .jsonl line or dataset row that holds text."}
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the blocks held out when the data has no validation part."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens a training sample."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training blocks only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first N validation blocks only."})

    def check(self) -> None:
        """Raise `UsageError` when sources contradict each other or a number is out of range."""
        if self.train_file and self.dataset_name:
            raise UsageError("--train_file and --dataset_name exclude each other. Give one.")
        if self.validation_file and not self.train_file:
            raise UsageError("--validation_file needs --train_file. Give both, or neither.")
        _check_range("block_size", self.block_size, minimum=2)
        _check_range("validation_split_percentage", self.validation_split_percentage, above=0, below=100)
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), minimum=1)


@dataclass
class TrainArguments:
    """How to train; the names and defaults are those of `transformers.TrainingArguments` where it has them."""

    output_dir: str = field(metadata={"help": "Where the model, the metrics, the plot and the summary go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that --output_dir holds, once this one has finished."}
    )
    optim: str = field(default="adamw_torch", metadata={"help": "A registered optimizer; see `dist-optim list`."})
    optim_args: str | None = field(
        default=None, metadata={"help": 'Its hyperparameters, for example "rank=64, update_proj_gap=200, scale=0.25".'}
    )
    optim_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules a low-rank optimizer projects: names, regexes, or all-linear."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "The peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Applied to all but biases and norms."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the global gradient norm; 0 turns clipping off."})
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": f"One of: {', '.join(schedule_names())}; or a class of torch.optim.lr_scheduler. greedy and "
            "reduce_lr_on_plateau decide after each evaluation, by the validation loss."
        },
    )
    lr_scheduler_kwargs: str | None = field(
        default=None, metadata={"help": 'Its options, for example "patience=2, min_lr=1e-6", or as JSON.'}
    )
    warmup_steps: float = field(default=0, metadata={"help": "Warmup steps; below 1, a share of all steps."})
    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps; overrides --num_train_epochs when positive."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training blocks."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks a rank and micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Blocks a rank in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches an optimizer step."})
    logging_steps: int = field(default=10, metadata={"help": "A line of metrics every so many steps."})
    eval_steps: int = field(default=100, metadata={"help": "Evaluate every so many steps, and at start and end."})
    save_steps: int = field(
        default=500, metadata={"help": "A checkpoint every so many steps, as OUTPUT_DIR/checkpoint-STEP; 0 for none."}
    )
    save_total_limit: int | None = field(default=None, metadata={"help": "Keep only the latest so many checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on from this checkpoint folder, or from the last one of --output_dir, if any: last."},
    )
    seed: int = field(default=42, metadata={"help": "Seeds the weights and the order of the data."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in bfloat16."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there are GPUs."})
    deepspeed: str | None = field(
        default=None, metadata={"help": "DeepSpeed's configuration file; its values and the flags must agree."}
    )
    local_rank: int = field(default=-1, metadata={"help": "Set by the deepspeed launcher; the environment decides."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})
    given: frozenset[str] = field(default=frozenset(), init=False)
    """Names of the arguments that the user gave; the others hold defaults."""

    def check(self) -> None:
        """Raise `UsageError` for a number out of range or an unknown schedule."""
        try:
            resolve_schedule(self.lr_scheduler_type)
        except DistOptimError as error:
            raise UsageError(f"--lr_scheduler_type: {error}") from error
        _check_range("learning_rate", self.learning_rate, minimum=0)
        _check_range("weight_decay", self.weight_decay, minimum=0)
        _check_range("max_grad_norm", self.max_grad_norm, minimum=0)
        _check_range("warmup_steps", self.warmup_steps, minimum=0)
        _check_range("num_train_epochs", self.num_train_epochs, above=0)
        _check_range("save_steps", self.save_steps, minimum=0)
        if self.save_total_limit is not None:
            _check_range("save_total_limit", self.save_total_limit, minimum=1)
        if self.max_steps != -1:
            _check_range("max_steps", self.max_steps, minimum=1)
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
        ):
            _check_range(name, getattr(self, name), minimum=1)


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit, so that one rank speaks for all."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See --help.")


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """Read a line of flags, or one `.json` / `.yaml` file.

    Raises:
        UsageError: An argument is unknown (the nearest known one is named), missing, of a wrong type or out of range.
    """
    parsed: list[Any]
    parser = _Parser((ModelArguments, DataArguments, TrainArguments), allow_abbrev=False)
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = _flags_of_file(argv[0])
    *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    _refuse_unknown(unknown)
    model, data, train = parsed
    train.given = frozenset(flag[2:].partition("=")[0] for flag in argv if flag.startswith("--"))
    for part in (model, data, train):
        part.check()
    return model, data, train


def _flags_of_file(path: str) -> list[str]:
    """Turn the file's entries into flags, so that both ways check types alike."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The arguments file {path!r} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"The arguments file {path!r} must hold one mapping of argument names to values.")
    _refuse_unknown([f"--{key}" for key in entries if key not in _known_names()])
    argv: list[str] = []
    for key, value in entries.items():
        if value is not None:
            argv += [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return argv


def _known_names() -> list[str]:
    return [item.name for kind in (ModelArguments, DataArguments, TrainArguments) for item in fields(kind)]


def _refuse_unknown(arguments: Sequence[str]) -> None:
    if not arguments:
        return
    name = arguments[0].lstrip("-").split("=")[0]
    near = difflib.get_close_matches(name, _known_names(), n=3)
    hint = f"Did you mean: {', '.join('--' + other for other in near)}?" if near else "See --help for all of them."
    raise UsageError(f"Unknown argument {arguments[0]!r}. {hint}")


def _check_range(
    name: str, value: float, *, minimum: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Raise `UsageError` unless ``minimum <= value``, ``above < value`` and ``value < below`` (NaN fails all)."""
    wanted = [
        (minimum is None or value >= minimum, f"at least {minimum}"),
        (above is None or value > above, f"above {above}"),
        (below is None or value < below, f"below {below}"),
    ]
    for holds, words in wanted:
        if not holds:
            raise UsageError(f"--{name} {value} is out of range: it must be {words}.")
