"""Wrong flags of `launch/train.py`, generated: each is one clear error, on every rank, and no number slips through."""

from __future__ import annotations

import io
import math
import random
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from end_to_end import make_llama
from train_runs import run_in
from trainers import Blocks, Job, arguments_of, fresh_accelerate

import train
from dist_optim.errors import DistOptimError, RanksDisagreeError
from dist_optim.integrations.transformers import Trainer, TrainingArguments
from dist_optim.integrations.transformers.argument_ranges import RANGES, Range
from dist_optim.testing import RankPool
from train_arguments import DATA_RANGES, KINDS, TRAIN_RANGES, make_arguments, read_arguments

NAMES = [item.name for kind in KINDS for item in fields(kind) if item.init]
EVERY_RANGE = {**TRAIN_RANGES, **DATA_RANGES}
WHOLE = {name for name in EVERY_RANGE if name.endswith(("_size", "_samples", "seed", "_workers", "_limit"))} | {
    *("gradient_accumulation_steps", "eval_accumulation_steps", "verify_steps"),
}
TEXTS = ("", "fast", "1e", "0x", "1,5", "None", "[1]", "--")


def wrong_numbers(allowed: Range, chance: random.Random) -> list[float]:
    """Numbers outside, near the borders and far away, and those that are none."""
    wrong = [math.nan, math.inf, -math.inf]
    for border in (allowed.minimum, allowed.above, allowed.below):
        for distance in (chance.uniform(0, 1), 1.0, 10 ** chance.uniform(0, 300)):
            wrong += [border - distance, border + distance] if math.isfinite(border) else []
    return [value for value in wrong if allowed.fault(value)]


@pytest.mark.parametrize("name", sorted(EVERY_RANGE))
def test_a_number_out_of_range_is_one_line_that_names_its_flag(name: str) -> None:
    chance = random.Random(name)
    numbers = wrong_numbers(EVERY_RANGE[name], chance)
    if name in WHOLE:
        numbers = [value for value in numbers if math.isfinite(value) and abs(value) < 2**40]
    given = [f"{round(value) if name in WHOLE else value}" for value in chance.sample(numbers, min(3, len(numbers)))]
    for text in [*(text for text in given if EVERY_RANGE[name].fault(float(text))), chance.choice(TEXTS)]:
        with pytest.raises(DistOptimError) as caught:
            make_arguments(read_arguments(["--output_dir", "out", f"--{name}={text}"]))
        assert name in str(caught.value) and len(str(caught.value)) < 300, (text, str(caught.value))


def test_numbers_within_their_ranges_are_taken() -> None:
    chance = random.Random(0)
    for name, allowed in EVERY_RANGE.items():
        low = max(allowed.minimum, allowed.above, 0.0)
        value = low + chance.uniform(0.1, 0.9) * min(1.0, allowed.below - low)
        assert not allowed.fault(math.ceil(value) if name in WHOLE else value), name


def test_a_misspelled_flag_is_answered_with_the_one_that_was_meant() -> None:
    chance = random.Random(1)
    for name in chance.sample([name for name in NAMES if len(name) > 8], 12):
        at = chance.randrange(1, len(name) - 1)
        flag = f"--{name[:at]}{name[at + 1]}{name[at]}{name[at + 2 :]}"
        if flag[2:] != name:
            with pytest.raises(DistOptimError, match=f"Did you mean.*--{name}"):
                read_arguments(["--output_dir", "out", flag, "1"])


WRONG_IN_PYTHON = [("seed", -1), ("learning_rate", math.inf), ("weight_decay", math.nan), ("adam_beta2", 1.0)]


@pytest.mark.parametrize(("name", "value"), WRONG_IN_PYTHON)
def test_the_arguments_of_any_trainer_are_checked(name: str, value: Any, tmp_path: Path) -> None:
    with fresh_accelerate(), pytest.raises(DistOptimError, match=f"^{name} {value} is out of range"):
        given: dict[str, Any] = {name: value}
        TrainingArguments(str(tmp_path), use_cpu=True, **given)
    assert name in RANGES


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--seed -1 --output_dir out", "error: --seed -1 is out of range: it must be at least 0."),
        ("--learning_rate inf --output_dir out", "error: --learning_rate inf is out of range: it must be finite."),
        ("--output_dir=", "error: --output_dir is missing, or empty. Name a folder for the results."),
        ("--optim galor_adamw --output_dir out", "error: There is no optimizer named 'galor_adamw'. The nearest"),
    ],
)
def test_every_rank_ends_with_exit_code_2_and_one_speaks(flags: str, said: str, two_ranks: RankPool) -> None:
    (code, output), other = run_in(two_ranks, *flags.split())
    assert (code, other) == (2, (2, ""))
    assert output.startswith(said) and output.count("\n") == 1


def said_without_use_cpu(*more: str) -> str:
    said = io.StringIO()
    with fresh_accelerate(), redirect_stdout(said):
        train._meet(["--output_dir", "out", *more])
    return said.getvalue()


def test_training_on_the_cpu_unasked_is_said_once(two_ranks: RankPool) -> None:
    assert two_ranks.run(said_without_use_cpu) == [
        "No GPU was found: this trains on the CPU. --use_cpu says that it is meant.\n",
        "",
    ]
    assert two_ranks.run(said_without_use_cpu, "--use_cpu") == ["", ""]


def versions_that_differ(optimizer: str) -> list[tuple[str, str]]:
    return [("torch", "2.13.0"), ("galore-torch", f"1.{dist.get_rank()}")]


def refusal_of_other_versions() -> str:
    other = mock.patch.object(train, "versions", versions_that_differ)
    with fresh_accelerate(), other, pytest.raises(DistOptimError) as caught:
        train._meet(["--output_dir", "out", "--use_cpu"])
    return str(caught.value)


def test_ranks_with_other_packages_all_refuse_and_name_the_package(two_ranks: RankPool) -> None:
    for said in two_ranks.run(refusal_of_other_versions):
        assert "galore-torch is '1.0' on rank 0 and '1.1' on rank 1" in said or "galore-torch is 1.0 on rank 0" in said


def test_what_is_found_of_ranges_is_what_the_dataclasses_have() -> None:
    assert set(EVERY_RANGE) <= set(NAMES)


def refusal_of_another_job(folder: str, **own: Any) -> str:
    """Rank 1 is given more."""
    more = own if dist.get_rank() else {}
    job = Job("sgd", settings={"max_steps": 1, "lr_scheduler_kwargs": {}})
    with fresh_accelerate():
        arguments = arguments_of(job, "ddp", folder, **{key: value for key, value in more.items() if key != "samples"})
        data = Blocks(more.get("samples", 2))
        try:
            Trainer(make_llama(), arguments, train_dataset=data).train()
        except RanksDisagreeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"seed": 7}, "seed is '42' on rank 0 and '7' on rank 1"),
        ({"save_strategy": "steps", "save_steps": 3}, "save_strategy is 'no' on rank 0 and 'steps' on rank 1"),
        ({"samples": 3}, "the number of samples in train_dataset is"),
        ({"disable_tqdm": False}, ""),
    ],
)
def test_ranks_of_a_trainer_that_were_given_another_job_all_refuse(
    own: dict[str, Any], said: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    for found in two_ranks.run(refusal_of_another_job, str(tmp_path), **own):
        assert said in found and bool(said) == bool(found)
