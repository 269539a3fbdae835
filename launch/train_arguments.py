"""The command line of `launch/train.py`: three dataclasses, as flags, as one `.yaml` or `.json` file, or as both.

Reading has two parts, because `TrainArguments` looks for the rank's device and peers when it is made: `read_arguments`
gives plain values, which ranks compare first, and `make_arguments` the dataclasses. Every mistake is a `UsageError`, or
another `DistOptimError`, whose message says what to change; nothing is printed and no process exits from here.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, SchedulerType

from dist_optim import parse_optim_args
from dist_optim.errors import DistOptimError
from dist_optim.integrations.transformers import TrainingArguments
from dist_optim.integrations.transformers.arguments import read_optim_args
from dist_optim.schedulers import resolve_schedule, schedule_names

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILE_TYPES = (".json", ".yaml", ".yml")
LAST = "last"
OWN_FLAGS = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}
DECISION_OPTIONS = ("metric_from_rank", "on_nonfinite")


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
        metadata={"help": "Tokenizer folder or hub name. Default: the checkpoint's own; one token a byte otherwise."},
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

    def __post_init__(self) -> None:
        if self.train_file and self.dataset_name:
            raise UsageError("--train_file and --dataset_name exclude each other. Give one.")
        if self.validation_file and not self.train_file:
            raise UsageError("--validation_file needs --train_file. Give both, or neither.")
        _check_range(self, "block_size", minimum=2)
        _check_range(self, "validation_split_percentage", above=0, below=100)
        for name in ("max_train_samples", "max_eval_samples"):
            _check_range(self, name, minimum=1)


@dataclass
class TrainArguments(TrainingArguments):
    """How to train: our `TrainingArguments`, with the defaults of a demonstration and checks of every number."""

    output_dir: str = field(default="", metadata={"help": "Where the model, metrics, plots and summary go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that --output_dir holds, once this one has finished."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on from this checkpoint folder, or from the last one of --output_dir, if any: last."},
    )
    optim: str = field(default="adamw_torch", metadata={"help": "A registered optimizer; see `dist-optim list`."})
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": f"One of: {', '.join(schedule_names())}; or a class of torch.optim.lr_scheduler. greedy and "
            "reduce_lr_on_plateau decide after each evaluation, by the validation loss."
        },
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training blocks."})
    logging_steps: float = field(default=10, metadata={"help": "A line of metrics every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "A line of metrics for the first step, too."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave losses that are not finite out."})
    eval_strategy: str = field(default="steps", metadata={"help": "Evaluate every --eval_steps steps, or: epoch, no."})
    eval_steps: float | None = field(default=100, metadata={"help": "Evaluate every so many steps, and at the end."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step, too."})
    save_steps: float = field(
        default=500, metadata={"help": "A checkpoint every so many steps, as OUTPUT_DIR/checkpoint-STEP; 0 for none."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for parameters that a step leaves out."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        self._check_numbers()
        mine: Any = self  # mypy does not follow transformers
        if not torch.accelerator.is_available():
            mine.use_cpu = True  # or accelerate forms no process group
        if str(mine.fsdp).lower() in ("true", "false"):  # from the command line
            mine.fsdp = str(mine.fsdp).lower() == "true"
        if self.save_steps == 0:
            mine.save_strategy = "no"
        mine.data_seed = self.seed if mine.data_seed is None else mine.data_seed
        _refuse_twice(mine.optim_args)
        schedule = self._check_schedule(mine)
        super().__post_init__()
        mine.lr_scheduler_type = next((one for one in SchedulerType if one.value == schedule), schedule)

    def _check_numbers(self) -> None:
        if not self.output_dir:
            raise UsageError("--output_dir is missing, or empty. Name a folder for the results.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps"):
            _check_range(self, name, minimum=0, below=math.inf)
        for name in ("num_train_epochs", "logging_steps", "eval_steps"):
            _check_range(self, name, above=0, below=math.inf)
        for name in ("seed", "data_seed"):
            _check_range(self, name, minimum=0, below=2**32)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check_range(self, name, minimum=1)
        _check_range(self, "save_total_limit", minimum=1)
        if self.max_steps != -1:
            _check_range(self, "max_steps", minimum=1)

    @staticmethod
    def _check_schedule(mine: Any) -> str:
        """The schedule's name, once it and its options are known; transformers is left one of its own names."""
        mine.lr_scheduler_kwargs = read_schedule_options(mine.lr_scheduler_kwargs)
        name = str(getattr(mine.lr_scheduler_type, "value", mine.lr_scheduler_type))
        recipe = resolve_schedule(name)
        recipe.check({key: value for key, value in mine.lr_scheduler_kwargs.items() if key not in DECISION_OPTIONS})
        mine.follows_metric = recipe.is_metric_driven
        if recipe.is_metric_driven:
            mine.metric_for_best_model = mine.metric_for_best_model or "loss"
        if name not in [one.value for one in SchedulerType]:
            mine.lr_scheduler_type = "linear"
        return name


def _refuse_twice(optim_args: Any) -> None:
    """Raise `UsageError` where `--optim_args` sets what has a flag of its own."""
    given = read_optim_args(optim_args) or {}
    for key in sorted((given if isinstance(given, dict) else parse_optim_args(given)).keys() & OWN_FLAGS.keys()):
        raise UsageError(f"--optim_args sets {key}, which has a flag of its own. Use {OWN_FLAGS[key]}.")


def read_schedule_options(given: Any) -> dict[str, Any]:
    """`--lr_scheduler_kwargs` as JSON, as a Python dict, or as ``key=value, key=value``.

    Raises:
        DistOptimError: It cannot be read.
    """
    if isinstance(given, dict):
        return given
    if given is None or not given.strip().startswith("{"):
        return parse_optim_args(given)
    for read in (json.loads, ast.literal_eval):
        try:
            return dict(read(given))
        except (ValueError, SyntaxError, TypeError):
            continue
    raise UsageError(
        f'--lr_scheduler_kwargs {given!r} cannot be read. Write "patience=2, factor=0.5", or the same as JSON.'
    )


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit, so that one rank speaks for all."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See --help.")


KINDS = (ModelArguments, DataArguments, TrainArguments)


def read_arguments(argv: Sequence[str]) -> Namespace:
    """The values of all arguments by name, and in ``given`` the names of those that the user set.

    A `.yaml` or `.json` file among the flags holds flags by their names; flags beside it override it.

    Raises:
        UsageError: An argument is unknown (the nearest known one is named), or its value of a wrong type.
    """
    argv, parser = list(argv), _Parser(KINDS, allow_abbrev=False)
    asked, unknown = parser.parse_known_args(argv)
    files = [word for word in unknown if word.endswith(FILE_TYPES) and not word.startswith("-")]
    if files:
        argv = [*_flags_of_file(files[0]), *argv[: argv.index(files[0])], *argv[argv.index(files[0]) + 1 :]]
        asked, unknown = parser.parse_known_args(argv)
    _refuse_unknown(unknown)
    flags = (flag[2:].partition("=")[0].replace("-", "_") for flag in argv if flag.startswith("--"))
    asked.given = sorted({name.removeprefix("no_") for name in flags})
    return asked


def make_arguments(asked: Namespace) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """The dataclasses, checked.

    Raises:
        DistOptimError: A value is out of range, or contradicts another.
    """
    values = {name: value for name, value in vars(asked).items() if name != "given"}
    made: Any = _Parser(KINDS).parse_dict(values)
    return made


def _flags_of_file(path: str) -> list[str]:
    """The file's entries as flags, so that both ways check types alike."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The arguments file {path!r} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"The arguments file {path!r} must hold one mapping of argument names to values.")
    _refuse_unknown([f"--{key}" for key in entries if key not in _known_names()])
    argv: list[str] = []
    for key, value in entries.items():
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _known_names() -> list[str]:
    return [item.name for kind in KINDS for item in fields(kind) if item.init]


def _refuse_unknown(arguments: Sequence[str]) -> None:
    if not arguments:
        return
    name = arguments[0].lstrip("-").split("=")[0]
    near = difflib.get_close_matches(name, _known_names(), n=3)
    hint = f"Did you mean: {', '.join('--' + other for other in near)}?" if near else "See --help for all of them."
    raise UsageError(f"Unknown argument {arguments[0]!r}. {hint}")


def _check_range(
    arguments: Any, name: str, *, minimum: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Raise `UsageError` unless ``minimum <= value``, ``above < value`` and ``value < below`` (NaN fails all)."""
    value = getattr(arguments, name)
    wanted = [
        (minimum is None or value is None or value >= minimum, f"at least {minimum}"),
        (above is None or value is None or value > above, f"above {above}"),
        (below is None or value is None or value < below, "finite" if below == math.inf else f"below {below}"),
    ]
    for holds, words in wanted:
        if not holds:
            raise UsageError(f"--{name} {value} is out of range: it must be {words}.")
