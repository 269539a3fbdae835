"""`dist_optim.run`: a stock script, unmodified, under real launchers."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from patience import PATIENCE_S
from safetensors.torch import load_file
from trainers import fresh_accelerate

from dist_optim import run
from dist_optim.errors import StepFailedError
from dist_optim.integrations import refusals
from dist_optim.testing import RankPool

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


def launch(*command: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
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
    """A name, a dict of hyperparameters and a strategy that the script has never heard of."""
    more = {"optim": "apollo_mini", "optim_args": {"update_proj_gap": 2}, "optim_target_modules": ["attn", "mlp"]}
    command = [*ACCELERATE, "--config_file", "configs/accelerate/fsdp2_cpu_2.yaml", "-m", "dist_optim.run", SCRIPT]
    done = launch(*command, argument_file(tmp_path, **more))
    report = report_of(tmp_path, done)
    assert (report["world_size"], report["optimizer"]) == (2, "DistributedOptimizer")
    assert done.stderr.count("dist_optim.run: the script finds these replaced") == 1
    assert "torchao" not in done.stderr, "a warning of kernels that are not there"
    assert "apollo_mini on 2 ranks" in done.stdout and "stepped on local slices" in done.stdout
    assert (tmp_path / "out" / "checkpoint-3" / "optimizer").is_dir()


def test_torchrun_with_deepspeed_on_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}))
    flags = ["--optim", "galore_adamw", "--optim_target_modules", "attn", "mlp", "--optim_args", "rank=4"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--use_cpu", "--report_to", "none"]
    done = launch(*TORCHRUN, "-m", "dist_optim.run", SCRIPT, *flags, "--deepspeed", str(config))
    report = report_of(tmp_path, done)
    assert (report["world_size"], report["optimizer"]) == (2, "DeepSpeedZeroOptimizer")
    assert 'DeepSpeed clips gradients to a norm of 1 ("gradient_clipping"' in done.stdout


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


def run_alone(arguments: str) -> None:
    """The script by itself, in the one rank of a pool."""
    alone = mock.patch.dict(os.environ, LOCAL_RANK="-1")
    with fresh_accelerate(), alone, mock.patch.object(sys, "argv", [SCRIPT, arguments]):
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")


def test_one_process_is_the_script_alone_but_for_subclasses(one_rank: RankPool, tmp_path: Path) -> None:
    """Where transformers knows the name, nothing changes: the same weights to the bit."""
    more = {"optim": "adamw_torch", "max_steps": 4, "save_strategy": "no", "load_best_model_at_end": False}
    files = {}
    for folder in ("alone", "run"):
        (tmp_path / folder).mkdir()
        files[folder] = argument_file(tmp_path / folder, **more)
    one_rank.run(run_alone, files["alone"])
    done = launch(*PYTHON, "-c", f"{CHECK}\nsys.argv = ['-c']\nrun.main([{SCRIPT!r}, {files['run']!r}])")
    assert report_of(tmp_path / "run", done)["optimizer"] == "DistributedOptimizer"
    assert all(done.stderr.count(f"{one.module}.{one.name} ") == 1 for one in run.REPLACED)
    alone, ours = (load_file(tmp_path / folder / "out" / "final" / "model.safetensors") for folder in ("alone", "run"))
    assert alone.keys() == ours.keys() and all(alone[name].equal(ours[name]) for name in alone)


MISTAKES = {
    r"raise UnsupportedError('no\n  such  thing')": r"error: SCRIPT, line 2: no such thing\n",
    "get_spec('galor_adamw')": r"error: SCRIPT, line 2: There is no optimizer named 'galor_adamw'. The nearest.*\n",
    "raise KeyboardInterrupt": r"\ninterrupted\n",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_or_an_interruption_is_one_line_of_rank_0(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"from dist_optim import get_spec; from dist_optim.errors import UnsupportedError\n{line}\n")
    monkeypatch.setattr(run, "replace_names", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(refusals, "OTHERS_SPEAK_S", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    said = []
    try:
        for rank, hears_of_rank_0 in (("0", False), ("1", True), ("1", False)):
            monkeypatch.setenv("RANK", rank)
            told = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
            if hears_of_rank_0:  # as the launcher tells the others when one has left
                told.start()
                monkeypatch.setattr(refusals, "OTHERS_SPEAK_S", 60.0)
                signal.signal(signal.SIGTERM, lambda *_: None)
            with pytest.raises(SystemExit) as caught:
                run.main([str(script)])
            assert caught.value.code == (130 if "Interrupt" in line else 2)
            if hears_of_rank_0:
                told.join()  # else it may come when nobody takes it, and end the worker
            said.append(capsys.readouterr().err)
            monkeypatch.setattr(refusals, "OTHERS_SPEAK_S", 0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert re.fullmatch(MISTAKES[line].replace("SCRIPT", re.escape(str(script))), said[0])
    assert said[1] == ""
    assert said[2] == ("" if "Interrupt" in line else said[0]), "a rank that is alone with its mistake says it"


def test_what_fails_while_it_runs_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text("from dist_optim.errors import *\nraise StepFailedError('as it ran')\n")
    monkeypatch.setattr(run, "replace_names", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(StepFailedError):
        run.main([str(tmp_path / "script.py")])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: python -m dist_optim.run"),
        (["--help"], 0, "usage: python -m dist_optim.run"),
        (["no_such_file.py"], 2, "error: 'no_such_file.py' is not a file"),
    ],
)
def test_bad_usage_is_explained(
    arguments: list[str], code: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_one_process_in_place_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As accelerate launch --num_processes 2 starts it where there is no GPU."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.setenv(name, "no")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            run.main([SCRIPT])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "has started one process" in said and said.count("\n") == 1


INTERRUPTED_IN_AN_IMPORT = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell has started in the background ignores it

class Interrupting:
    def find_spec(self, name, *others):
        if name == "torch":  # the first import that takes seconds
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""
INSTALLED = "import sys; sys.argv = ['/usr/bin/dist-optim', 'list']; from dist_optim.cli import app; app()"


@pytest.mark.parametrize(
    ("program", "is_ours"),
    [(["-m", "dist_optim.run", SCRIPT], True), (["-c", INSTALLED], True), (["-c", "import dist_optim"], False)],
)
def test_interrupted_while_it_is_imported(program: list[str], is_ours: bool, tmp_path: Path) -> None:
    """One line from our programs; who imports the package keeps Python's own answer."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IN_AN_IMPORT)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [*PYTHON, *program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    if is_ours:
        assert (done.returncode, done.stderr, done.stdout) == (130, "\ninterrupted\n", "")
    else:
        assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr
