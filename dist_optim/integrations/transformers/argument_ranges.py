"""The numbers among ``TrainingArguments``, and which of them can be meant.

transformers takes any: a seed of -1 ends inside numpy, an infinite rate in weights that are not numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_optim.errors import UsageError

__all__ = ["COUNT", "POSITIVE", "RANGES", "Range", "check_ranges"]


@dataclass(frozen=True, slots=True)
class Range:
    """``minimum <= value``, ``above < value`` and ``value < below``; NaN is in none."""

    minimum: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def fault(self, value: float) -> str:
        """What the value must be and is not; empty where it is right."""
        if not value >= self.minimum:
            return f"at least {self.minimum:g}"
        if not value > self.above and self.above > -math.inf:
            return f"above {self.above:g}"
        if not -math.inf < value < self.below:
            return "finite" if self.below == math.inf else f"below {self.below:.0f}"
        return ""


NOT_NEGATIVE, POSITIVE, COUNT, FRACTION = Range(minimum=0), Range(above=0), Range(minimum=1), Range(minimum=0, below=1)
SEED = Range(minimum=0, below=2**32)
RANGES = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs", "warmup_steps", "verify_steps"),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), FRACTION),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), COUNT
    ),
}
"""What no use of ``TrainingArguments`` can do without."""


def check_ranges(arguments: Any, ranges: Mapping[str, Range] = RANGES, prefix: str = "") -> None:
    """Check the numbers that are set.

    Args:
        arguments: ``TrainingArguments``, or an object with some of ``ranges``' names.
        ranges: By the argument's name.
        prefix: Goes before the name in the message: "--" for a command line.

    Raises:
        UsageError: A value is out of its range.
    """
    values = {name: getattr(arguments, name, None) for name in ranges}
    faults = {name: ranges[name].fault(value) for name, value in values.items() if isinstance(value, (int, float))}
    for name, words in faults.items():
        if words:
            raise UsageError(f"{prefix}{name} {values[name]} is out of range: it must be {words}.")
