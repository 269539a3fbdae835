"""launch/train.py under ``accelerate launch`` with each packaged file, on one GPU; checkpoints go on under another."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measuring.on_gpu.rows import Items, Settings, Skipped

__all__ = ["items"]

ROOT = Path(__file__).resolve().parents[3]
FIRST = ("fsdp2", "zero3")
"""What one has saved is gone on with under the other."""
REST = ("ddp", "fsdp2_offload", "zero2", "zero3_offload", "fsdp1", "zero1")
JOB = ["--optim", "galore_adamw", "--optim_target_modules", "attn", "mlp", "--optim_args", "rank=32, update_proj_gap=3"]
JOB += ["--learning_rate", "2e-3", "--bf16", "--block_size", "128", "--per_device_train_batch_size", "4"]
JOB += ["--max_steps", "8", "--save_steps", "4", "--logging_steps", "4", "--report_to", "none"]
VERIFIED = 3
EQUAL = f"the first {VERIFIED} steps: equal to upstream's galore_adamw in one process, to the bit"
TIMEOUT_S = 120.0


def items(settings: Settings) -> Items:
    """Each strategy, and what two of them have saved, under the other."""
    folder = tempfile.TemporaryDirectory(prefix="doors-")
    atexit.register(folder.cleanup)
    runs = Path(folder.name)
    found: dict[str, Any] = {name: partial(trained, name, runs, settings) for name in FIRST}
    found |= {
        f"{saved}, gone on with under {other}": partial(resumed, saved, other, runs, settings)
        for saved, other in (FIRST, FIRST[::-1])
    }
    found |= {name: partial(trained, name, runs, settings) for name in REST}
    return dict(list(found.items())[:1]) if settings.is_quick else found


def trained(strategy: str, runs: Path, settings: Settings, *flags: str, name: str = "") -> dict[str, Any]:
    """A run to its end; what the unmodified optimizer says of its first steps, where it can be asked.

    Raises:
        AssertionError: It ended with an error.
    """
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    is_verified = not strategy.startswith("zero") and not flags
    output = runs / (name or strategy)
    config = ROOT / "configs" / "accelerate" / f"{strategy}.yaml"
    if settings.device == "cpu":
        config = config.with_name(f"{strategy}_cpu_2.yaml")
        flags = (*flags, "--use_cpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "1", str(ROOT / "launch" / "train.py"), *JOB, "--output_dir", str(output), *flags]
    command += ["--verify_steps", str(VERIFIED)] if is_verified else []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    said = ran.stdout + ran.stderr
    if ran.returncode or (is_verified and EQUAL not in said):
        errors = [line for line in said.splitlines() if "rror:" in line] or said.splitlines()[-1:]
        raise AssertionError(f"exit code {ran.returncode}: {errors[0]}")
    summary = json.loads((output / "summary.json").read_text())
    return {
        "loss": round(summary["eval_loss_last"], 4),
        "first_loss": round(summary["eval_loss_first"], 4),
        "same_weights": is_verified or None,
        "state_mb": round(sum(summary["optimizer_state_bytes_per_rank"]) / 1e6, 2),
    }


def resumed(saved: str, other: str, runs: Path, settings: Settings) -> dict[str, Any]:
    """From the middle of a run.

    Raises:
        AssertionError: It ended with an error.
    """
    checkpoint = runs / saved / "checkpoint-4"
    if not checkpoint.exists():
        trained(saved, runs, settings)
    return trained(other, runs, settings, "--resume_from_checkpoint", str(checkpoint), name=f"{saved}-{other}")
