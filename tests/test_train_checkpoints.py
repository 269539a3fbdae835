"""`launch/train.py` saves and goes on: the resumed run is the run that was never broken off, decisions included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_runs import GALORE, FinishedRun, finished_in, rows_of

from dist_optim.errors import UsageError
from dist_optim.integrations.transformers.history import checkpoints_in
from dist_optim.integrations.transformers.run_report import RunDirectory, find_checkpoint
from dist_optim.reporting.files import DECISIONS
from dist_optim.testing import RankPool, assert_equal

FLAGS = (
    *(*GALORE, "--learning_rate", "2e-2", "--max_steps", "7", "--logging_steps", "1", "--disable_tqdm", "true"),
    *("--eval_steps", "1", "--save_steps", "2", "--gradient_accumulation_steps", "2"),
    *("--lr_scheduler_type", "greedy", "--lr_scheduler_kwargs", "patience=0, min_lr=1e-6, factor=0.5, warmup=0"),
    *("--max_train_samples", "20"),  # epochs of ten batches a rank: the break is in the first, the end in the second
)


@pytest.fixture(scope="module")
def whole_run(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_in(two_ranks, tmp_path_factory.mktemp("whole") / "run", *FLAGS)


@pytest.fixture(scope="module")
def resumed_run(two_ranks: RankPool, whole_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    directory = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(whole_run.output_dir / "checkpoint-4", directory / "checkpoint-4")
    more = ("--resume_from_checkpoint", "last", "--save_total_limit", "1")
    return finished_in(two_ranks, directory, *FLAGS, *more)


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


def test_the_rate_falls_and_rises_as_the_log_says(whole_run: FinishedRun) -> None:
    rows = rows_of(whole_run.output_dir / DECISIONS)
    assert [(row["number"], row["step"]) for row in rows] == [(number, number) for number in range(1, 8)]
    assert {"raised", "lowered"} <= {row["decision"] for row in rows}
    losses = {row["step"]: row["eval_loss"] for row in whole_run.metrics if "eval_loss" in row}
    rates = {row["step"]: row["learning_rate"] for row in whole_run.metrics if "learning_rate" in row}
    for row in rows:
        assert row["metric"] == losses[row["step"]]
        assert row["old_lr"][0] == rates[row["step"]]
        assert row["step"] == 7 or row["new_lr"][0] == rates[row["step"] + 1]
    summary = whole_run.summary
    assert sum(summary["lr_decisions"].values()) == 7 and summary["learning_rate_last"] == rows[-1]["new_lr"][0]
    assert "learning rate lowered from 0.04 to 0.02" in whole_run.output and "greedy:" in whole_run.output
    assert (whole_run.output_dir / "lr.png").stat().st_size > 5_000


def test_the_limit_keeps_the_latest_checkpoints(whole_run: FinishedRun, resumed_run: FinishedRun) -> None:
    def names(run: FinishedRun) -> list[str]:
        return [path.name for path in checkpoints_in(run.output_dir)]

    assert names(whole_run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert names(resumed_run) == ["checkpoint-6"]


def test_a_checkpoint_opens_under_another_strategy_and_with_safetensors_alone(
    two_ranks: RankPool, whole_run: FinishedRun, tmp_path: Path
) -> None:
    checkpoint = whole_run.output_dir / "checkpoint-4"
    flags = (*FLAGS, "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint))  # it ends where it begins
    other = finished_in(two_ranks, tmp_path / "run", *flags, config="fsdp2_cpu_2")
    assert (other.summary["strategy"], other.summary["steps"]) == ("fsdp2", 4)
    assert_equal(weights(other), load_file(checkpoint / "model.safetensors"))
    assert max(row["step"] for row in other.metrics) == 4, "no step was taken"


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
    with pytest.raises(UsageError, match="was not saved by a Trainer"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), str(tmp_path))
