"""Every file of configs/accelerate is one that accelerate takes, and that prepare serves; the CPU ones really run."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launch_files import CONFIGS, REPOSITORY, launch_environment
from train_runs import GALORE, SUMMARY_KEYS, FinishedRun, finished_in
from transformers import AutoConfig, AutoModelForCausalLM

from dist_optim.integrations.accelerate.placing import refuse_fsdp_settings
from dist_optim.testing import RankPool

MESHES = {
    "hsdp.yaml": (2, 4, 1),
    "hsdp_cpu_4.yaml": (2, 2, 1),
    "fsdp2_tp.yaml": (1, 4, 2),
    "fsdp2_tp_cpu_4.yaml": (1, 2, 2),
    "hsdp_tp.yaml": (2, 2, 2),
    "hsdp_tp_cpu_8.yaml": (2, 2, 2),
}
"""Replicas, shards, and ranks of tensor parallelism."""
ON_TWO_MACHINES = {"hsdp.yaml": 8, "fsdp2_tp.yaml": 8, "hsdp_tp.yaml": 4}
"""Shards of 16 GPUs."""


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
    refuse_fsdp_settings(plugin, parallelism)
    assert plugin.fsdp_version == (1 if strategy == "fsdp1" else 2)
    assert plugin.auto_wrap_policy is not None, "everything in one unit would gather the whole model at once"
    sizes = (parallelism.dp_replicate_size, parallelism.dp_shard_size, parallelism.tp_size) if parallelism else None
    assert sizes == MESHES.get(name)
    assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") == ("offload" in name)


SEVERAL_MACHINES = ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1"]
FIRST_MACHINE = ["--main_process_ip", "node0", "--main_process_port", "29500"]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if "_cpu_" not in path.name))
def test_every_gpu_file_serves_several_machines_by_flags(name: str) -> None:
    """As configs/README.md has them; a file for each number of machines would differ in these numbers alone."""
    flags = ["--config_file", str(CONFIGS / name), *SEVERAL_MACHINES, *FIRST_MACHINE]
    if name.startswith("zero"):
        flags += ["--deepspeed_multinode_launcher", "standard"]
    if name in ON_TWO_MACHINES:
        flags += ["--parallelism_config_dp_shard_size", str(ON_TWO_MACHINES[name])]
    with mock.patch.dict(os.environ):
        arguments = launch_command_parser().parse_args([*flags, "script.py"])
        arguments, defaults, _ = _validate_launch_command(arguments)
        assert (defaults.num_machines, defaults.num_processes) == (1, 8), "the file itself is for one machine"
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher's own note of what it has read
            _, given = prepare_deepspeed_cmd_env(arguments)
        else:
            given = prepare_multi_gpu_env(arguments)
    assert (str(arguments.nnodes), str(arguments.nproc_per_node), arguments.node_rank) == ("2", "8", 1)
    if name in ON_TWO_MACHINES:
        sizes = [int(given[f"PARALLELISM_CONFIG_{axis}_SIZE"]) for axis in ("DP_REPLICATE", "DP_SHARD", "TP")]
        assert sizes == [MESHES[name][0], ON_TWO_MACHINES[name], MESHES[name][2]]


MODELS = {
    "llama_tiny.json": 3_034_368,
    "llama_1b.json": 1_235_814_400,
    "llama_3b.json": 3_212_749_824,
    "llama_8b.json": 8_030_261_248,
    "llama_70b.json": 70_553_706_496,
}
"""Parameters, as their makers publish them; tied embeddings count once."""


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "configs" / "models").glob("*")))
def test_a_model_configuration_has_the_published_number_of_parameters(name: str) -> None:
    config = AutoConfig.from_pretrained(REPOSITORY / "configs" / "models" / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == MODELS[name]
    theta = 10_000.0 if name == "llama_tiny.json" else 500_000.0
    assert model.config.rope_parameters["rope_theta"] == theta


SHORT = ("--learning_rate", "1e-3", "--max_steps", "4", "--logging_steps", "1", "--eval_steps", "1")
SCHEDULE_FREE = (*SHORT, "--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def schedule_free_runs(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        strategy: finished_in(two_ranks, folder / strategy, *SCHEDULE_FREE, config=f"{strategy}_cpu_2")
        for strategy in ("fsdp1", "fsdp2")
    }


class TestTrained:
    """With what the launcher makes of each file, on ranks that are there already."""

    def test_galore_under_fsdp2(self, two_ranks: RankPool, tmp_path: Path) -> None:
        run = finished_in(two_ranks, tmp_path / "run", *SHORT, *GALORE, "--bf16", config="fsdp2_cpu_2")
        assert run.summary.keys() >= SUMMARY_KEYS
        assert (run.summary["strategy"], run.summary["world_size"], run.summary["steps"]) == ("fsdp2", 2, 4)
        assert run.summary["eval_loss_last"] < run.summary["eval_loss_first"]

    def test_hsdp_is_rehearsed_on_four_ranks(self, four_ranks: RankPool, tmp_path: Path) -> None:
        run = finished_in(four_ranks, tmp_path / "run", *SHORT, *GALORE, config="hsdp_cpu_4")
        assert (run.summary["strategy"], run.summary["world_size"]) == ("hsdp", 4)
        assert run.summary["eval_loss_last"] < run.summary["eval_loss_first"]
        total = 8 * MODELS["llama_tiny.json"]
        assert run.summary["adamw_state_bytes_per_rank"] == pytest.approx([total / 2] * 4, rel=0.01)

    def test_fsdp2_with_offloaded_parameters(self, two_ranks: RankPool, tmp_path: Path) -> None:
        run = finished_in(two_ranks, tmp_path / "run", *SHORT, *GALORE, config="fsdp2_offload_cpu_2")
        assert (run.summary["strategy"], run.summary["world_size"]) == ("fsdp2", 2)
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
        run = schedule_free_runs[strategy]
        assert run.exported_loss() == pytest.approx(run.summary["eval_loss_last"], rel=1e-4)
