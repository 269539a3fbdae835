"""`launch/train.py` saves and goes on: the resumed run is the run that was never broken off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_script import REPOSITORY, TWO_RANKS, FinishedRun, finished_run

from dist_optim.testing import assert_equal
from train_arguments import UsageError
from train_report import RunDirectory, checkpoints_in, find_checkpoint

SCHEDULE = ("--lr_scheduler_type", "greedy", "--lr_scheduler_kwargs", "patience=0, min_lr=1e-6, factor=0.5, warmup=0")
FLAGS: tuple[str, ...] = (
    "--max_steps",
    "7",
    "--logging_steps",
    "2",
    "--eval_steps",
    "1",
    "--save_steps",
    "2",
    *SCHEDULE,
)
FLAGS += ("--max_train_samples", "20")  # epochs of ten batches a rank: the break is in the first, the end in the second
FLAGS += ("--gradient_accumulation_steps", "2")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(TWO_RANKS, tmp_path_factory.mktemp("whole") / "run", *FLAGS)


@pytest.fixture(scope="module")
def resumed_run(whole_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    directory = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(whole_run.output_dir / "checkpoint-4", directory / "checkpoint-4")
    return finished_run(TWO_RANKS, directory, *FLAGS, "--resume_from_checkpoint", "last", "--save_total_limit", "1")


def weights(run: FinishedRun) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "model" / "model.safetensors")


def test_the_resumed_run_has_the_same_weights_metrics_and_decisions(
    whole_run: FinishedRun, resumed_run: FinishedRun
) -> None:
    assert "resuming from" in resumed_run.output
    assert_equal(weights(resumed_run), weights(whole_run))
    kept = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in resumed_run.metrics]
    assert kept == [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in whole_run.metrics]
    logs = [(run.output_dir / "lr_decisions.jsonl").read_text() for run in (resumed_run, whole_run)]
    assert logs[0] == logs[1] and len({json.loads(line)["decision"] for line in logs[0].splitlines()}) > 1


def test_the_limit_keeps_the_latest_checkpoints(whole_run: FinishedRun, resumed_run: FinishedRun) -> None:
    def names(run: FinishedRun) -> list[str]:
        return [path.name for path in checkpoints_in(run.output_dir)]

    assert names(whole_run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert names(resumed_run) == ["checkpoint-6"]


def test_a_checkpoint_opens_under_another_strategy_and_with_safetensors_alone(
    whole_run: FinishedRun, tmp_path: Path
) -> None:
    checkpoint = whole_run.output_dir / "checkpoint-4"
    launcher = [*TWO_RANKS[:-1], str(REPOSITORY / "configs/accelerate/fsdp2_cpu_2.yaml")]
    flags = (*FLAGS, "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint))  # it ends where it begins
    other = finished_run(launcher, tmp_path / "run", *flags)
    assert (other.summary["strategy"], other.summary["steps"]) == ("fsdp2", 4)
    assert_equal(weights(other), load_file(checkpoint / "model.safetensors"))
    rows = [json.loads(line) for line in (other.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 4, "no step was taken"


def test_a_folder_with_checkpoints_is_not_written_over_unasked(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UsageError, match="--resume_from_checkpoint last"):
        RunDirectory(str(tmp_path)).claim(overwrite=False, resume=None)
    assert RunDirectory(str(tmp_path)).claim(overwrite=False, resume="last")
    assert (tmp_path / "checkpoint-3").is_dir()
    replacing = RunDirectory(str(tmp_path))
    assert replacing.claim(overwrite=True, resume=None)
    assert (tmp_path / "checkpoint-3").is_dir(), "kept until the new run has saved"
    replacing.drop_stale_checkpoints()
    assert not (tmp_path / "checkpoint-3").exists()


def test_which_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(None, str(tmp_path)) is None
    assert find_checkpoint("last", str(tmp_path)) is None
    for name in ("checkpoint-5", "checkpoint-10", ".checkpoint-20.partial", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert find_checkpoint("last", str(tmp_path)) == tmp_path / "checkpoint-10"
    with pytest.raises(UsageError, match="checkpoint-10"):
        find_checkpoint(str(tmp_path / "checkpoint-7"), str(tmp_path))
    with pytest.raises(UsageError, match="was not saved by launch/train.py"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), str(tmp_path))
