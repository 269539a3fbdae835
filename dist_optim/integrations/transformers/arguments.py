"""``TrainingArguments`` that take every registered optimizer, and what they mean to one.

transformers passes some of its arguments to some optimizers and drops the rest without a word: weight decay, betas and
eps of GaLore and LOMO, a fraction as ``warmup_steps`` of schedule-free, "False" (a true string) in ``optim_args``. Here
what differs from its default is passed on, or refused where the optimizer has nothing of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from transformers.training_args import OptimizerNames

from dist_optim.errors import HyperparameterError
from dist_optim.integrations.environment import num_ranks_asked_for, refuse_lone_process
from dist_optim.integrations.transformers.argument_ranges import check_ranges
from dist_optim.integrations.transformers.names import name_of
from dist_optim.integrations.transformers.rehearsal import prepare_deepspeed
from dist_optim.specs.hyperparameters import parse_optim_args
from dist_optim.specs.registry import OptimizerSpec, get_spec, spec_of_class

__all__ = ["TrainingArguments", "listed", "read_hyperparameters", "read_optim_args", "values_for"]


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with every name of ``dist_optim.names()`` in ``optim``.

    ``optim_args`` is a string as in transformers (``"rank=64, scale=0.25, betas=(0.9, 0.99)"``; values are read as
    Python literals), JSON text, or a dict. In it, ``rest=NAME, rest_lr=3e-4`` are ``rest`` and ``rest_options`` of
    ``build_optimizer``; JSON and a dict may hold ``params``, groups by pattern. ``optim_target_modules`` may be one
    string too. ``allow_changed`` (also as a list) names hyperparameters that may be others than in the run that is
    resumed, and take the values given here; and parts of its folder that may be of another save
    (``checkpoint.folder_seal.PARTS``). ``verify_steps`` is that of ``build_optimizer``. With ``asynchronous_saves``
    checkpoints are written while training goes on (``beside_training``). All else is unchanged.
    """

    # Redeclared: argparse would offer only transformers' own names, read no dict, and take a single module.
    optim: str = field(
        default=transformers.TrainingArguments.default_optim,
        metadata={"help": "The optimizer: one of transformers' names, or of `dist-optim list`."},
    )
    optim_args: dict | str | None = field(
        default=None,
        metadata={"help": 'Its hyperparameters: "rank=64, scale=0.25", or JSON. See `dist-optim list NAME`.'},
    )
    optim_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules a low-rank optimizer projects: parts of names, regular expressions, or all-linear."},
    )

    allow_changed: str | None = field(
        default=None,
        metadata={
            "help": "Hyperparameters that may be others than in the run that is resumed, as: lr,weight_decay; and "
            "parts of its checkpoint that may be of another save: model,scheduler."
        },
    )
    verify_steps: int = field(
        default=0,
        metadata={
            "help": "Step the first so many steps a second time by upstream's own class, in one process, and compare "
            "every weight. Rank 0 has the whole model once more until then."
        },
    )

    asynchronous_saves: bool = field(
        default=False,
        metadata={
            "help": "Train on while a checkpoint is written: a save waits for a copy on the host, and for the save "
            "before. What failed is told at the next step."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        refuse_lone_process()
        if num_ranks_asked_for() != 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # or accelerate takes each rank for a job of its own
        wanted, self.optim_args = name_of(self.optim), read_optim_args(self.optim_args)
        if wanted not in [member.value for member in OptimizerNames]:
            get_spec(wanted)  # the nearest names, where it is unknown
            self.optim = OptimizerNames.ADAMW_TORCH
        prepare_deepspeed(self)
        super().__post_init__()
        self.optim = next((member for member in OptimizerNames if member.value == wanted), wanted)

    def set_optimizer(self, name: str = "adamw_torch", *values: Any, **named: Any) -> TrainingArguments:
        """As in transformers, for every registered name; ``args`` may be a dict."""
        known = str(name) in [member.value for member in OptimizerNames]
        if not known:
            get_spec(name)
        super().set_optimizer(name if known else OptimizerNames.ADAMW_TORCH, *values, **named)
        self.optim, self.optim_args = (self.optim if known else name), read_optim_args(self.optim_args)
        return self


def listed(given: Any) -> list[str]:
    """Names out of a text with commas, or a list of them."""
    names = given.split(",") if isinstance(given, str) else list(given or ())
    return [name.strip() if isinstance(name, str) else name for name in names if name]


def read_optim_args(given: str | Mapping[str, Any] | None) -> Any:
    """JSON text becomes a dict; anything else stays as it is, once it has been found readable.

    Raises:
        HyperparameterError: It can be read as neither.
    """
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            return json.loads(given)
        except json.JSONDecodeError as error:
            raise HyperparameterError(f"optim_args: {given!r} starts as JSON and is none: {error}.") from error
    if isinstance(given, str):
        parse_optim_args(given)
    return given


REST = "rest_"
"""``rest_lr=3e-4`` in a text of ``optim_args`` is ``rest_options={"lr": 3e-4}``, which a text cannot hold."""


def read_hyperparameters(arguments: Any) -> dict[str, Any]:
    """``optim_args``, in any of its forms, as a dict; keys that begin with ``rest_`` are gathered in ``rest_options``.

    Raises:
        HyperparameterError: One of them is in ``rest_options`` too.
    """
    text = arguments.optim_args
    given = dict(text) if isinstance(text, Mapping) else parse_optim_args(text)
    options = dict(given.pop("rest_options", None) or {})
    for key in [key for key in given if key.startswith(REST)]:
        own = key.removeprefix(REST)
        if own in options:
            raise HyperparameterError(f"optim_args: {own!r} is in rest_options, and {key} is given. Keep one of them.")
        options[own] = given.pop(key)
    return {**given, "rest_options": options} if options else given


def values_for(spec: OptimizerSpec, arguments: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the arguments mean to this optimizer: keywords of ``build_optimizer``, ``weight_decay`` among them.

    Args:
        spec: The optimizer.
        arguments: transformers' ``TrainingArguments``, or ours.
        given: Hyperparameters that were set by other means than ``optim_args``, and go before the arguments.

    Raises:
        HyperparameterError: Two settings contradict each other, or the optimizer has nothing to set.
    """
    given = read_hyperparameters(arguments) if given is None else given
    known = {record.name for record in spec.records()}
    values = dict(given)
    offered = {
        "lr": ("learning_rate", arguments.learning_rate, _is_set(arguments, "learning_rate")),
        "betas": (
            "adam_beta1 and adam_beta2",
            (arguments.adam_beta1, arguments.adam_beta2),
            _is_set(arguments, "adam_beta1") or _is_set(arguments, "adam_beta2"),
        ),
        "eps": ("adam_epsilon", arguments.adam_epsilon, _is_set(arguments, "adam_epsilon")),
        "weight_decay": ("weight_decay", arguments.weight_decay, _is_set(arguments, "weight_decay")),
        "warmup_steps": ("warmup_steps", arguments.warmup_steps, _is_set(arguments, "warmup_steps")),
    }
    for key, (argument, value, is_set) in offered.items():
        if is_set and key in given and _plain(given[key]) != value:
            raise HyperparameterError(
                f"{argument} is {value!r} and {key}={given[key]!r} is given with the optimizer. Keep one of the two."
            )
        if key not in given and (is_set or key == "lr") and (key in known or spec.is_undescribed):
            values[key] = _as_wanted(spec, key, value)
        elif is_set and key in _known_to_rest(spec, given):
            values["rest_options"] = {key: value, **(values.get("rest_options") or {})}
        elif is_set and key not in given and key != "warmup_steps":  # the schedule has a warm-up of its own
            raise HyperparameterError(
                f"{argument} is {value!r}, and {spec.name} has no {key!r}, so that it would be ignored. Leave it out; "
                f"`dist-optim list {spec.name}` shows what there is to set in optim_args."
            )
    return values


def _known_to_rest(spec: OptimizerSpec, given: Mapping[str, Any]) -> set[str]:
    """Hyperparameters of what steps the parameters that this optimizer does not take."""
    rest = given.get("rest") or spec.rest
    if not rest:
        return set()
    other = get_spec(rest) if isinstance(rest, str) else spec_of_class(rest)
    return {record.name for record in other.records()}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_set(arguments: Any, name: str) -> bool:
    """Whether an argument differs from transformers' default: what equals it cannot be told from unset."""
    (default,) = (one.default for one in fields(transformers.TrainingArguments) if one.name == name)
    return bool(getattr(arguments, name) != default)


def _as_wanted(spec: OptimizerSpec, key: str, value: Any) -> Any:
    record = next((record for record in spec.records() if record.name == key), None)
    if key == "eps" and record is not None and record.kind == "floats":
        raise HyperparameterError(
            f"adam_epsilon={value!r} is one number, and eps of {spec.name} is {record.describe_type()}: "
            f"{record.meaning}. Leave adam_epsilon out, and set eps=(...) in optim_args."
        )
    return float(value) if key == "warmup_steps" else value
