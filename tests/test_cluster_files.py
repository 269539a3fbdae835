"""The launch files of clusters, as far as one machine can tell: bash reads them, and what they start is well-formed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launch_files import CONFIGS, REPOSITORY, launch_environment
from torch.distributed.run import config_from_args, get_args_parser

from train_arguments import read_arguments

LAUNCH = REPOSITORY / "launch"
SCRIPTS = [LAUNCH / "multinode.sh", LAUNCH / "slurm.sbatch"]
MINE = ["--optim", "galore_adamw", "--optim_args", "rank=8, scale=1.0", "--output_dir", "runs/mine"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_script(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    checkers = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for checker in checkers:
        done = subprocess.run([*checker, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def started_by(script: Path, tmp_path: Path, environment: dict[str, str], *commands: str) -> list[list[str]]:
    """The arguments of every call of the commands, which are stood in for."""
    calls = tmp_path / "calls"
    for name in commands:
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" >>{calls}; printf "\\n" >>{calls}\n')
    # srun runs its command on each node; scontrol lists the nodes.
    (tmp_path / "srun").write_text(
        '#!/usr/bin/env bash\nshift\nfor node in 0 1; do SLURM_NODEID=$node "$@" || exit; done\n'
    )
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'node0\\nnode1\\n'\n")
    for name in (*commands, "srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    given = {**os.environ, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([str(script), *MINE], env=given, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.rstrip("\0").split("\0")[1:] for line in calls.read_text().splitlines()]


def assert_trains_and_resumes(script: str, arguments: list[str]) -> None:
    assert Path(script).resolve() == LAUNCH / "train.py" or script == "launch/train.py"
    assert read_arguments(arguments).resume_from_checkpoint == "last"


class TestMultinode:
    def test_torchrun_is_given_what_the_environment_says(self, tmp_path: Path) -> None:
        asked = {"NNODES": "2:4", "NPROC_PER_NODE": "8", "RDZV_ENDPOINT": "node0:29400", "RDZV_ID": "mine"}
        (call,) = started_by(LAUNCH / "multinode.sh", tmp_path, {**asked, "MAX_RESTARTS": "5"}, "python")
        assert Path(call[0]).resolve() == LAUNCH / "agent.py"  # torchrun, and a guard
        arguments = get_args_parser().parse_args(call[1:])
        config, _, _ = config_from_args(arguments)
        assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 4, 8, 5)
        assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "node0:29400", "mine")
        assert_trains_and_resumes(arguments.training_script, arguments.training_script_args)
        assert arguments.training_script_args[-len(MINE) :] == MINE


SLURM = {
    **{"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "4321", "SLURM_JOB_NODELIST": "node[0-1]"},
}


class TestSlurm:
    @pytest.mark.parametrize("config", ["fsdp2", "hsdp", "ddp"])
    def test_each_node_starts_its_ranks_of_one_job(self, tmp_path: Path, config: str) -> None:
        environment = {**SLURM, "CONFIG": f"configs/accelerate/{config}.yaml"}
        calls = started_by(LAUNCH / "slurm.sbatch", tmp_path, environment, "accelerate")
        assert len(calls) == 2
        for node, call in enumerate(calls):
            assert call[0] == "launch"
            arguments = self.checked(call[1:])
            assert (str(arguments.nnodes), str(arguments.nproc_per_node), arguments.node_rank) == ("2", "4", node)
            assert (arguments.rdzv_backend, str(arguments.max_restarts)) == ("c10d", "3")
            assert (arguments.main_process_ip, arguments.main_process_port) == ("node0", 24321)
            if config == "hsdp":
                sizes = arguments.parallelism_config_dp_replicate_size, arguments.parallelism_config_dp_shard_size
                assert tuple(map(int, sizes)) == (2, 4)
            assert_trains_and_resumes(arguments.training_script, arguments.training_script_args)

    def test_deepspeed_ranks_are_started_by_each_node_itself(self, tmp_path: Path) -> None:
        environment = {**SLURM, "CONFIG": "configs/accelerate/zero3.yaml"}
        for call in started_by(LAUNCH / "slurm.sbatch", tmp_path, environment, "accelerate"):
            arguments = self.checked(call[1:])
            assert arguments.use_deepspeed and arguments.deepspeed_multinode_launcher == "standard"

    def test_one_agent_a_node(self) -> None:
        text = (LAUNCH / "slurm.sbatch").read_text()
        directives = dict(
            line[len("#SBATCH --") :].partition("=")[::2] for line in text.split("\n") if "#SBATCH" in line
        )
        assert directives["ntasks-per-node"] == "1"
        assert "requeue" in directives and "gpus-per-node" in directives

    @staticmethod
    def checked(call: list[str]) -> Namespace:
        with mock.patch.dict(os.environ):
            arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(call))
            prepare_multi_gpu_env(arguments)
        return arguments


class TestKubeflow:
    @pytest.fixture
    def job(self) -> dict[str, Any]:
        (document,) = yaml.safe_load_all((LAUNCH / "pytorchjob.yaml").read_text())
        return json.loads(json.dumps(document))

    def test_the_job_is_an_elastic_pytorchjob(self, job: dict[str, Any]) -> None:
        assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
        elastic, replicas = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]
        assert set(replicas) == {"Worker"}, "with an elasticPolicy no pod is the master"
        assert elastic["minReplicas"] <= replicas["Worker"]["replicas"] <= elastic["maxReplicas"]
        assert elastic["rdzvBackend"] == "c10d" and elastic["maxRestarts"] > 0
        container = self.container(job)
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == elastic["nProcPerNode"]

    def test_what_it_starts_is_the_training_script(self, job: dict[str, Any]) -> None:
        container = self.container(job)
        assert container["command"] == ["torchrun"]
        assert container["workingDir"] in (REPOSITORY / "docker" / "Dockerfile.cuda").read_text()
        script, *flags = container["args"]
        assert_trains_and_resumes(script, flags)
        training = read_arguments(flags)
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(training.output_dir.startswith(f"{mount}/") for mount in mounts), "checkpoints must outlive the pod"

    def test_every_volume_is_mounted(self, job: dict[str, Any]) -> None:
        named = {volume["name"] for volume in self.pod(job)["volumes"]}
        assert named == {mount["name"] for mount in self.container(job)["volumeMounts"]}

    def test_the_environment_is_that_of_the_accelerate_configuration(self, job: dict[str, Any]) -> None:
        launched = launch_environment(CONFIGS / "fsdp2.yaml")
        given = {one["name"]: one["value"] for one in self.container(job)["env"] if one["name"] != "OMP_NUM_THREADS"}
        assert given
        assert {name: launched[name].lower() for name in given} == {name: text.lower() for name, text in given.items()}

    @staticmethod
    def pod(job: dict[str, Any]) -> dict[str, Any]:
        return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]

    def container(self, job: dict[str, Any]) -> dict[str, Any]:
        (container,) = self.pod(job)["containers"]
        return container
