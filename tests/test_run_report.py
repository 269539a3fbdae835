"""`RunReport` on any Trainer, without `launch/train.py`: the folder that it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end import make_llama
from trainers import Blocks, Job, arguments_of, fresh_accelerate

from dist_optim.errors import CheckpointError, UsageError
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.run_report import FINISHED_NAMES, Progress, RunReport
from dist_optim.reporting.page import page
from dist_optim.reporting.reading import read_runs

JOB = Job("sgd", settings={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})


def trained(folder: Path, report: RunReport, resume: str | None = None, **more: Any) -> tuple[Trainer, dict[str, Any]]:
    with fresh_accelerate():
        torch.manual_seed(0)
        arguments = arguments_of(JOB, "alone", folder, **more)
        trainer = Trainer(make_llama(), arguments, train_dataset=Blocks(), callbacks=[report, Progress()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, report.finish(trainer)


def test_a_run_leaves_its_folder_and_a_second_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = RunReport()
    trainer, summary = trained(tmp_path, report)
    left = {path.name for path in tmp_path.iterdir()} - {"checkpoint-2", "checkpoint-4"}
    assert left == set(FINISHED_NAMES)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["samples_per_second"] > 0 for row in rows)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["samples_per_second"] for entry in logged] == [row["samples_per_second"] for row in rows]
    size = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert summary["adamw_state_bytes_per_rank"] == [2 * size] and summary["optimizer_state_bytes_per_rank"] == [0]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 4
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["settings"]["optim"] == "sgd" and {"optim", "max_steps"} <= set(about["set"])
    assert "seed" not in about["set"] and about["coverage"] == 1.0 and about["versions"]["torch"] == torch.__version__
    shown = page(read_runs([tmp_path]))
    assert about["audit"].startswith("dist_optim: sgd on 1 rank") and "dist_optim: sgd on 1 rank" in shown
    assert "What is not here" in shown and "No telemetry" in shown and "run.json" not in shown
    capsys.readouterr()
    report.print_summary(summary)
    shown = capsys.readouterr().out
    assert "that of torch's AdamW" in shown and "training loss" in shown and "validation loss" not in shown
    with pytest.raises(UsageError, match=r"already holds a run.*report.claim\(output_dir, overwrite=True\)"):
        trained(tmp_path, RunReport())


def test_a_resumed_run_has_the_rows_of_one_without_a_break(tmp_path: Path) -> None:
    whole, resumed = RunReport(tokens_per_sample=8), RunReport(tokens_per_sample=8)
    trained(tmp_path / "whole", whole)
    trained(tmp_path / "resumed", resumed, str(tmp_path / "whole" / "checkpoint-2"), hub_token="a secret")
    about = (tmp_path / "resumed" / "run.json").read_text()
    assert json.loads(about)["resumed_from_step"] == 2 and "a secret" not in about
    columns = ([[row["step"], row["loss"]] for row in report.rows] for report in (whole, resumed))
    assert next(columns) == next(columns)
    assert resumed.rows[0]["tokens_per_second"] == whole.rows[0]["tokens_per_second"], "the time before counts"
    with pytest.raises(CheckpointError, match="saved at step 4, and this run has 3"):
        trained(tmp_path / "short", RunReport(), str(tmp_path / "whole" / "checkpoint-4"), max_steps=3)


def test_who_is_refused_a_folder_leaves_it_as_it_is(tmp_path: Path) -> None:
    """Another job may be writing into it."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "metrics.jsonl").write_text("{}")
    report = RunReport()
    with pytest.raises(UsageError, match="holds checkpoints of a run"):
        report.claim(str(tmp_path))
    report.discard()
    report.give_up()
    assert (tmp_path / ".unfinished" / "metrics.jsonl").exists()
