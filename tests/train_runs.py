"""`launch/train.py` through a launcher, as users run it, and its `main` on the ranks of a pool, which wait already.

A start through a launcher costs some ten seconds: it is for what the launcher and the process have a part in (signals,
exit codes, files of configuration), and a pool for all else.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from launch_files import CONFIGS, REPOSITORY, launch_environment
from patience import PATIENCE_S
from trainers import fresh_accelerate

import train
import train_arguments
import train_data
from dist_optim.testing import RankPool

TWO_RANKS = [*(sys.executable, "-m", "accelerate.commands.launch"), *("--config_file", str(CONFIGS / "ddp_cpu_2.yaml"))]
ONE_RANK = [sys.executable]
LOW_RANK = ("--optim_target_modules", "attn", "mlp", "--optim_args", "rank=16,update_proj_gap=2")
GALORE = ("--optim", "galore_adamw", *LOW_RANK)
SMALL = ("--use_cpu", "--per_device_train_batch_size", "2", "--max_eval_samples", "6", "--block_size", "64")

SUMMARY_KEYS = {
    *("optim", "strategy", "world_size", "steps", "tokens_per_second"),
    *("train_loss_first", "train_loss_last", "eval_loss_first", "eval_loss_last"),
    *("optimizer_state_bytes_per_rank", "adamw_state_bytes_per_rank", "peak_memory_bytes_per_rank"),
}


def command(launcher: list[str], *flags: str | Path) -> list[str]:
    return [*launcher, str(REPOSITORY / "launch" / "train.py"), *SMALL, *(str(flag) for flag in flags)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}


def run_script(launcher: list[str], *flags: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(launcher, *flags),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


OURS = (
    r"train: .*",  # the bar
    r"step \d+/\d+: (validation loss|learning rate) .*",
    r"dist_optim: .*",
    r"  (group \d|stepped |DeepSpeed clips |galore_adamw as matrices).*",  # the audit
    r"[┌│└].*",  # the table of the summary, and its title
    r" *\w+ on \d ranks?, \w+ *",
    r"\s*",
)
"""Every line that a run prints."""


def foreign_lines(output: str) -> list[str]:
    """What the libraries say between our lines."""
    lines = re.split(r"[\r\n]+", output)
    return [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in OURS)]


@dataclass(frozen=True)
class FinishedRun:
    output_dir: Path
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return rows_of(self.output_dir / "metrics.jsonl")

    def exported_loss(self) -> float:
        """The loss of the exported model on the validation blocks that the run evaluated."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self.output_dir / "model")
        tokenizer = AutoTokenizer.from_pretrained(self.output_dir / "model")
        data = train_arguments.DataArguments(block_size=64, max_eval_samples=6)
        _, blocks = train_data.load_blocks(data, tokenizer)
        assert type(model).__name__ == "LlamaForCausalLM"
        with torch.no_grad():
            return model(input_ids=blocks.rows.long(), labels=blocks.rows.long()).loss.item()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finished_run(launcher: list[str], output_dir: Path, *flags: str | Path, folder: Path | None = None) -> FinishedRun:
    done = run_script(launcher, *flags, "--output_dir", output_dir, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRun(output_dir, done.stdout + done.stderr)


KEPT = {"is_initialized": dist.is_initialized, "barrier": dist.barrier, "destroy_process_group": mock.Mock()}


def main_on_rank(argv: list[str], given: dict[str, str]) -> tuple[int, str]:
    """(exit code, output) of this rank, whose process group and signals stay as they are."""
    said, ended = io.StringIO(), 0
    with (
        fresh_accelerate(),
        mock.patch.dict(os.environ, given),
        mock.patch.object(train, "ignore_signals"),
        mock.patch.object(train, "dist", SimpleNamespace(**KEPT)),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        try:
            train.main(argv, mock.Mock())
        except SystemExit as end:
            ended = int(end.code or 0)
        gc.collect()  # an engine and its configuration
    return ended, said.getvalue()


def run_in(pool: RankPool, *flags: str | Path, config: str = "") -> list[tuple[int, str]]:
    """Every rank's (exit code, output), as torchrun, or `accelerate launch` with a file of configs/, would start it."""
    given = {"LOCAL_RANK": "-1"} if pool.world_size == 1 else {}
    launched = launch_environment(CONFIGS / f"{config}.yaml") if config else {}
    given |= {
        name: text for name, text in launched.items() if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))
    }
    return pool.run(main_on_rank, [*SMALL, *map(str, flags)], given)


def finished_in(pool: RankPool, output_dir: Path, *flags: str | Path, config: str = "") -> FinishedRun:
    ends = run_in(pool, *flags, "--output_dir", output_dir, config=config)
    assert [code for code, _ in ends] == [0] * pool.world_size, ends
    assert not any(said for _, said in ends[1:]), ends[1:]
    return FinishedRun(output_dir, ends[0][1])
