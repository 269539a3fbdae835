"""`launch/train.py` with GreedyLR: a run whose rate falls and rises, the same run cut in two, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_train_script import TWO_RANKS, run_script
from trainers import fresh_accelerate

from dist_optim.errors import DistOptimError
from train_arguments import TrainArguments, make_arguments, read_arguments, read_schedule_options
from train_report import LOG_NAME, refuse_without_decisions

GREEDY = (
    *("--optim", "adafactor", "--learning_rate", "2e-2", "--logging_steps", "1", "--disable_tqdm", "true"),
    *("--max_steps", "12", "--eval_steps", "2", "--save_steps", "6"),
    *("--lr_scheduler_type", "greedy", "--lr_scheduler_kwargs", "patience=0, factor=0.5, min_lr=1e-4"),
)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def greedy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output_dir = tmp_path_factory.mktemp("greedy") / "run"
    done = run_script(TWO_RANKS, *GREEDY, "--output_dir", output_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    return output_dir, done.stdout + done.stderr


def test_the_rate_falls_and_rises_as_the_log_says(greedy_run: tuple[Path, str]) -> None:
    output_dir, output = greedy_run
    rows = rows_of(output_dir / LOG_NAME)
    assert [(row["number"], row["step"]) for row in rows] == [(number, 2 * number) for number in range(1, 7)]
    assert {"raised", "lowered"} <= {row["decision"] for row in rows}
    metrics = rows_of(output_dir / "metrics.jsonl")
    losses = {row["step"]: row["eval_loss"] for row in metrics if "eval_loss" in row}
    rates = {row["step"]: row["learning_rate"] for row in metrics if "learning_rate" in row}
    for row in rows:
        assert row["metric"] == losses[row["step"]]
        assert row["old_lr"][0] == rates[row["step"]]
        assert row["step"] == 12 or row["new_lr"][0] == rates[row["step"] + 1]
    summary = json.loads((output_dir / "summary.json").read_text())
    assert sum(summary["lr_decisions"].values()) == 6 and summary["learning_rate_last"] == rows[-1]["new_lr"][0]
    assert "learning rate lowered from 0.04 to 0.02" in output and "greedy:" in output
    assert (output_dir / "lr.png").stat().st_size > 5_000


def test_a_run_resumed_in_the_middle_has_the_same_log(greedy_run: tuple[Path, str], tmp_path: Path) -> None:
    output_dir, _ = greedy_run
    checkpoint = output_dir / "checkpoint-6"
    done = run_script(TWO_RANKS, *GREEDY, "--resume_from_checkpoint", checkpoint, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    log = LOG_NAME
    assert (tmp_path / "run" / log).read_text() == (output_dir / log).read_text()


@pytest.mark.parametrize(
    "text", ["patience=2, min_lr=1e-6", '{"patience": 2, "min_lr": 1e-6}', "{'patience': 2, 'min_lr': 1e-06}"]
)
def test_options_are_read_as_pairs_as_json_and_from_a_file(text: str) -> None:
    assert read_schedule_options(text) == {"patience": 2, "min_lr": 1e-6}


def test_a_mapping_of_an_arguments_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nlr_scheduler_type: greedy\nlr_scheduler_kwargs:\n  patience: 2\n  mode: min\n"
    )
    with fresh_accelerate():
        _, _, arguments = make_arguments(read_arguments([str(tmp_path / "run.yaml")]))
    assert arguments.lr_scheduler_kwargs == {"patience": 2, "mode": "min"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_kwargs": "patince=2"}, "Did you mean patience"),
        ({"lr_scheduler_kwargs": "{patience: 2"}, "cannot be read"),
        ({"lr_scheduler_kwargs": "patience"}, "key=value"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean cosine"),
        ({"eval_steps": 100}, "Set --eval_steps"),
    ],
)
def test_what_could_not_decide_is_refused(settings: dict[str, Any], said: str) -> None:
    with fresh_accelerate(), pytest.raises(DistOptimError, match=said):
        settings = {"lr_scheduler_type": "greedy", "eval_steps": 10, **settings}
        refuse_without_decisions(TrainArguments(output_dir="out", **settings), 50)


def test_a_class_of_torch_is_a_schedule() -> None:
    with fresh_accelerate():
        made = TrainArguments(output_dir="out", lr_scheduler_type="StepLR", lr_scheduler_kwargs="step_size=3")
    assert (made.lr_scheduler_type, made.lr_scheduler_kwargs) == ("StepLR", {"step_size": 3})
