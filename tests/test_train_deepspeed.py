"""`launch/train.py` under DeepSpeed: its three launchers on two CPU ranks, and flags against the configuration."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from launch_files import CONFIGS, REPOSITORY
from train_runs import GALORE, SUMMARY_KEYS, finished_in, finished_run, foreign_lines, run_in

from dist_optim.errors import UsageError
from dist_optim.integrations.transformers.deepspeed_flags import settle_deepspeed
from dist_optim.testing import RankPool
from train_arguments import read_arguments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

JSONS = REPOSITORY / "configs" / "deepspeed"
ZERO_YAML = sorted(path.name for path in CONFIGS.glob("zero*.yaml"))
SHORT = ("--max_steps", "3", "--logging_steps", "1", "--eval_steps", "1", "--per_device_train_batch_size", "2")


def test_every_json_has_its_accelerate_files() -> None:
    names = sorted(path.stem for path in JSONS.glob("zero*.json"))
    assert sorted(f"{name}{kind}.yaml" for name in names for kind in ("", "_cpu_2")) == ZERO_YAML


@pytest.mark.parametrize("name", ZERO_YAML)
def test_accelerate_reads_the_file_as_the_configuration_of_its_name(name: str) -> None:
    """All that a rank is told stands in the file itself, so that it serves any script, in any folder."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert arguments.use_deepspeed and arguments.num_processes == (2 if "_cpu_2" in name else 8)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, given = prepare_deepspeed_cmd_env(argparse.Namespace(**vars(arguments)))
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in given and given["ACCELERATE_MIXED_PRECISION"] == "no"
    with mock.patch.dict(os.environ, given):
        config = DeepSpeedPlugin().hf_ds_config.config
    zero = config["zero_optimization"]
    assert f"zero{zero['stage']}" == name[:5]
    assert ("offload" in name) == (zero["offload_optimizer"]["device"] == "cpu")
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == ("auto", "auto")
    assert given["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str("zero3" in name).lower()


def deepspeed_launcher() -> list[str]:
    """One rank on a free port: the launcher takes a fixed one otherwise, and 0 for a number."""
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(port)]


class TestTrained:
    def test_as_by_accelerate_with_the_file_of_the_repository(self, two_ranks: RankPool, tmp_path: Path) -> None:
        flags = (*SHORT, *GALORE, "--max_grad_norm", "0.5")
        run = finished_in(two_ranks, tmp_path / "run", *flags, config="zero2_cpu_2")
        assert run.summary.keys() >= SUMMARY_KEYS
        found = (run.summary["optim"], run.summary["strategy"], run.summary["world_size"])
        assert found == ("galore_adamw", "zero2", 2)
        assert run.summary["eval_loss_last"] < run.summary["eval_loss_first"]
        assert foreign_lines(run.output) == []
        assert "low rank 16" in run.output and "clips gradients to a norm of 0.5" in run.output

    def test_as_by_torchrun_the_exported_model_holds_the_averaged_weights(
        self, two_ranks: RankPool, tmp_path: Path
    ) -> None:
        """ZeRO-3 of a model made under zero.Init; accumulated, clipped, evaluated."""
        config: dict[str, Any] = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        flags = ("--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant", "--learning_rate", "1e-3")
        more = ("--deepspeed", tmp_path / "zero3.json", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5")
        run = finished_in(two_ranks, tmp_path / "run", *SHORT, "--max_steps", "2", "--eval_steps", "2", *flags, *more)
        assert run.summary["strategy"] == "zero3" and foreign_lines(run.output) == []
        assert "clips gradients to a norm of 0.5" in run.output
        assert run.exported_loss() == pytest.approx(run.summary["eval_loss_last"], rel=1e-4)

    def test_a_contradiction_ends_all_ranks(self, two_ranks: RankPool, tmp_path: Path) -> None:
        flags = ("--deepspeed", JSONS / "galore_adamw_zero2.json", "--optim", "sgd", "--output_dir", tmp_path / "run")
        (code, said), *others = run_in(two_ranks, *flags)
        assert said.startswith("error: --per_device_train_batch_size 2 contradicts") and said.count("\n") == 1
        assert "galore_adamw_zero2.json" in said
        assert (code, others) == (2, [(2, "")])
        assert not (tmp_path / "run").exists()

    def test_with_the_optimizer_of_the_configuration(self, two_ranks: RankPool, tmp_path: Path) -> None:
        flags = (*SHORT, "--deepspeed", own_configuration(tmp_path))
        run = finished_in(two_ranks, tmp_path / "run", *flags)
        assert "low rank 64" in run.output  # target modules and rank are the configuration's
        assert (run.summary["strategy"], run.summary["world_size"]) == ("zero2", 2)

    def test_by_the_launcher_of_deepspeed(self, tmp_path: Path) -> None:
        """It gives each rank its number as a flag; one rank and one step say whether that is read."""
        flags = ("--max_steps", "1", "--eval_strategy", "no", "--deepspeed", own_configuration(tmp_path))
        run = finished_run(deepspeed_launcher(), tmp_path / "run", *flags)
        assert (run.summary["strategy"], run.summary["world_size"]) == ("zero2", 1)


def own_configuration(folder: Path) -> Path:
    config = json.loads((JSONS / "galore_adamw_zero2.json").read_text())
    (folder / "own.json").write_text(json.dumps({**config, "train_micro_batch_size_per_gpu": "auto"}))
    return folder / "own.json"


def settled(folder: Path, config: dict[str, Any], *flags: str) -> tuple[dict[str, Any], argparse.Namespace]:
    arguments = read_arguments(["--output_dir", "out", *flags])
    (folder / "zero.json").write_text(json.dumps(config))
    arguments.deepspeed = str(folder / "zero.json")
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}):
        settle_deepspeed(arguments, arguments.given)
    return arguments.deepspeed, arguments


def test_flags_fill_in_what_the_configuration_leaves_out(tmp_path: Path) -> None:
    section = {"type": "dist_optim.adagrad", "params": {"lr": "auto"}}
    config, arguments = settled(
        tmp_path,
        {"optimizer": section, "gradient_clipping": 0.3, "zero_optimization": {"stage": 3}},
        *("--learning_rate", "0.5", "--gradient_accumulation_steps", "4", "--bf16"),
    )
    assert config["optimizer"]["params"] == {"lr": 0.5, "weight_decay": 0.0}
    assert (config["gradient_accumulation_steps"], config["bf16"]["enabled"]) == (4, True)
    assert "train_batch_size" not in config, "DeepSpeed finds it, for as many ranks as there are"
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert (arguments.optim, arguments.max_grad_norm) == ("adagrad", 0.3)


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ({"gradient_clipping": 1.0}, "--max_grad_norm 0.5", "--max_grad_norm 0.5 contradicts .*zero.json"),
        ({"bf16": {"enabled": False}}, "--bf16", "bf16.enabled is False"),
        (
            {"optimizer": {"type": "sgd"}},
            "--optim adafactor",
            "adafactor contradicts .* optimizer.type is sgd",
        ),
        (
            {"optimizer": {"type": "sgd", "params": {"lr": 1}}},
            "--learning_rate 2",
            "optimizer.params.lr is 1",
        ),
        ({"train_batch_size": 17}, "", 'sets "train_batch_size": 17, and the other numbers give 16'),
        ({"scheduler": {"type": "WarmupLR"}}, "", "use --lr_scheduler_type"),
    ],
)
def test_a_flag_that_contradicts_the_configuration_is_refused(
    config: dict[str, Any], flags: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        settled(tmp_path, config, *flags.split())
