"""Every file of configs/accelerate is one that accelerate takes, and that prepare serves; the CPU ones really run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from test_train_script import GALORE, REPOSITORY, SUMMARY_KEYS, TWO_RANKS, FinishedRun, run_script

import train_arguments
import train_data
from dist_optim.integrations.accelerate import _refuse_fsdp_settings

CONFIGS = REPOSITORY / "configs" / "accelerate"


def launch_environment(config: Path) -> dict[str, str]:
    """What ``accelerate launch --config_file`` gives to each rank, beyond what this process has."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return dict(prepare_multi_gpu_env(arguments).items() - os.environ.items())


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("[!z]*.yaml")))  # zero*: DeepSpeed's
def test_accelerate_reads_the_file_as_the_strategy_of_its_name(name: str) -> None:
    given = launch_environment(CONFIGS / name)
    strategy = name.split(".")[0].split("_")[0]
    assert given.get("ACCELERATE_USE_FSDP", "false") == ("false" if strategy == "ddp" else "true")
    if strategy == "ddp":
        return
    with mock.patch.dict(os.environ, given):
        plugin = FullyShardedDataParallelPlugin()
        parallelism = ParallelismConfig() if "ACCELERATE_USE_PARALLELISM_CONFIG" in given else None
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=parallelism)
    _refuse_fsdp_settings(accelerator)
    assert plugin.fsdp_version == (1 if strategy == "fsdp1" else 2)
    assert plugin.auto_wrap_policy is not None, "everything in one unit would gather the whole model at once"
    sizes = (parallelism.dp_replicate_size, parallelism.dp_shard_size) if parallelism else None
    assert sizes == ((2, 4) if strategy == "hsdp" else None)


def launched(strategy: str, output_dir: Path, *flags: str) -> FinishedRun:
    launcher = [*TWO_RANKS[:-1], str(CONFIGS / f"{strategy}_cpu_2.yaml")]
    flags = ("--learning_rate", "1e-3", "--max_steps", "4", "--logging_steps", "1", "--eval_steps", "1", *flags)
    done = run_script(launcher, *flags, "--output_dir", output_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRun(output_dir, done.stdout + done.stderr)


SCHEDULE_FREE = ("--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def schedule_free_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    folder = tmp_path_factory.mktemp("runs")
    return {strategy: launched(strategy, folder / strategy, *SCHEDULE_FREE) for strategy in ("fsdp1", "fsdp2")}


class TestLaunched:
    def test_galore_under_fsdp2(self, tmp_path: Path) -> None:
        run = launched("fsdp2", tmp_path / "run", *GALORE, "--bf16")
        assert run.summary.keys() >= SUMMARY_KEYS
        assert (run.summary["strategy"], run.summary["world_size"], run.summary["steps"]) == ("fsdp2", 2, 4)
        assert run.summary["eval_loss_last"] < run.summary["eval_loss_first"]

    def test_schedule_free_is_the_same_run_under_fsdp1_and_fsdp2(
        self, schedule_free_runs: dict[str, FinishedRun]
    ) -> None:
        for strategy, run in schedule_free_runs.items():
            assert run.summary["strategy"] == strategy
            assert run.summary["eval_loss_last"] < run.summary["eval_loss_first"]
        first, second = schedule_free_runs.values()
        for key in ("loss", "eval_loss"):
            values, others = ([row[key] for row in run.metrics if key in row] for run in (first, second))
            assert values == pytest.approx(others, rel=1e-4)

    @pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
    def test_the_exported_model_holds_the_averaged_weights(
        self, schedule_free_runs: dict[str, FinishedRun], strategy: str
    ) -> None:
        """Evaluation saw averaged weights; the model in the folder gives the loss that evaluation gave last."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        run = schedule_free_runs[strategy]
        model = AutoModelForCausalLM.from_pretrained(run.output_dir / "model")
        tokenizer = AutoTokenizer.from_pretrained(run.output_dir / "model")
        data = train_arguments.DataArguments(block_size=64, max_eval_samples=6)
        _, blocks = train_data.load_blocks(data, tokenizer)
        with torch.no_grad():
            loss = model(input_ids=blocks.rows.long(), labels=blocks.rows.long()).loss.item()
        assert type(model).__name__ == "LlamaForCausalLM"
        assert loss == pytest.approx(run.summary["eval_loss_last"], rel=1e-4)
