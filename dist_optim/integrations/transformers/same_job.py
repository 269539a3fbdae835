"""Ranks of one job were given one job: compared once, before the Trainer prepares anything.

Where they differ the stock Trainer trains something else without a word (another seed, other data), or waits for ever
(another ``save_steps``: a rank saves alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sized
from typing import Any

from dist_optim.ranks.agreement import assert_ranks_equal

__all__ = ["assert_same_job"]

COMPARED = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "train_sampling_strategy", "dataloader_drop_last"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("bf16", "fp16", "gradient_checkpointing", "label_smoothing_factor", "average_tokens_across_devices"),
    *("logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_on_start"),
    *("save_strategy", "save_steps", "save_only_model", "load_best_model_at_end", "metric_for_best_model"),
)
"""What changes the trajectory, or when ranks meet. Where results go, and what is shown, may differ."""


def assert_same_job(trainer: Any) -> None:
    """Compare arguments and sizes of data. Collective.

    Raises:
        RanksDisagreeError: On all ranks, with the first difference.
    """
    remedy = "Start all ranks with the same arguments and data."
    assert_ranks_equal("What the Trainer was given", list(_given(trainer)), remedy)


def _given(trainer: Any) -> Iterator[tuple[str, Any]]:
    for name in COMPARED:
        value = getattr(trainer.args, name, None)
        yield name, re.sub(r" at 0x[0-9a-f]+", "", str(getattr(value, "value", value)))  # each rank has its addresses
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name, None)
        if isinstance(data, Sized):
            yield f"the number of samples in {name}", len(data)
