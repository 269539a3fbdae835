"""`dist_optim.run`: a stock script, unmodified, under real launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dist_optim import run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "tests/scripts/train_classifier.py"
PYTHON = [sys.executable]
ACCELERATE = [*PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ARGUMENTS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def launch(*command: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def argument_file(tmp_path: Path, **more: Any) -> str:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({**ARGUMENTS, "output_dir": str(tmp_path / "out"), **more}))
    return str(file)


def report_of(tmp_path: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    return report


def test_accelerate_launch_with_fsdp2_and_an_argument_file(tmp_path: Path) -> None:
    """A name, a dict of hyperparameters and a strategy that the script has never heard of; then resumed."""
    more = {"optim": "apollo_mini", "optim_args": {"update_proj_gap": 2}, "optim_target_modules": ["attn", "mlp"]}
    file = argument_file(tmp_path, **more)
    command = [*ACCELERATE, "--config_file", "configs/accelerate/fsdp2_cpu_2.yaml", "-m", "dist_optim.run", SCRIPT]
    done = launch(*command, file)
    report = report_of(tmp_path, done)
    assert (report["world_size"], report["optimizer"]) == (2, "DistributedOptimizer")
    assert done.stderr.count("dist_optim.run: the script finds these replaced") == 1
    assert "apollo_mini on 2 ranks" in done.stdout and "stepped on local slices" in done.stdout
    weights = load_file(tmp_path / "out" / "final" / "model.safetensors")
    argument_file(tmp_path, **more, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    resumed = report_of(tmp_path, launch(*command, file))
    assert [row for row in resumed["log"] if "loss" in row] == [row for row in report["log"] if "loss" in row]
    again = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(weights[name].equal(again[name]) for name in weights)


def test_torchrun_with_deepspeed_on_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}))
    flags = ["--optim", "galore_adamw", "--optim_target_modules", "attn", "mlp", "--optim_args", "rank=4"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--use_cpu", "--report_to", "none"]
    done = launch(*TORCHRUN, "-m", "dist_optim.run", SCRIPT, *flags, "--deepspeed", str(config))
    report = report_of(tmp_path, done)
    assert (report["world_size"], report["optimizer"]) == (2, "DeepSpeedZeroOptimizer")
    assert 'DeepSpeed clips gradients to a norm of 1 ("gradient_clipping"' in done.stdout


def test_one_process_is_the_script_alone(tmp_path: Path) -> None:
    """Where transformers knows the name, nothing changes: the same weights to the bit."""
    for folder, command in (("alone", [SCRIPT]), ("run", ["-m", "dist_optim.run", SCRIPT])):
        (tmp_path / folder).mkdir()
        file = argument_file(tmp_path / folder, optim="adamw_torch", max_steps=4, save_strategy="no",
                             load_best_model_at_end=False)  # fmt: skip
        report = report_of(tmp_path / folder, launch(*PYTHON, *command, file))
        assert report["optimizer"] == {"alone": "AdamW", "run": "DistributedOptimizer"}[folder]
    alone, ours = (load_file(tmp_path / folder / "out" / "final" / "model.safetensors") for folder in ("alone", "run"))
    assert alone.keys() == ours.keys() and all(alone[name].equal(ours[name]) for name in alone)


CHECK = """
import gc, sys
import transformers
from dist_optim import run
from dist_optim.errors import UnsupportedError

class Early(transformers.Trainer):
    pass

try:
    run.replace_names()
except UnsupportedError as error:
    assert "Early was made of transformers' own Trainer" in str(error), error
else:
    raise AssertionError("what was made of the originals keeps them")
del Early
gc.collect()
originals = {one.name: getattr(sys.modules[one.module], one.name) for one in run.REPLACED}
run.replace_names()
run.replace_names()
for one in run.REPLACED:
    found = getattr(sys.modules[one.module], one.name)
    assert found is one.replacement() and issubclass(found, originals[one.name]) and found is not originals[one.name]
assert issubclass(transformers.Seq2SeqTrainer, transformers.Trainer)
assert issubclass(transformers.Seq2SeqTrainingArguments, transformers.TrainingArguments)
"""


def test_everything_replaced_is_a_subclass_and_is_said() -> None:
    done = launch(*PYTHON, "-c", CHECK)
    assert done.returncode == 0, done.stderr
    assert all(done.stderr.count(f"{one.module}.{one.name} ") == 1 for one in run.REPLACED)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: python -m dist_optim.run"),
        (["--help"], 0, "usage: python -m dist_optim.run"),
        (["no_such_file.py"], "'no_such_file.py' is not a file", ""),
    ],
)
def test_bad_usage_is_explained(
    arguments: list[str], code: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert code in str(caught.value.code) if isinstance(code, str) else caught.value.code == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
