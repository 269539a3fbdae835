"""Two agents of `launch/multinode.sh` on this machine: a worker is killed, and the job ends as if nothing had been."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from launch_files import REPOSITORY
from patience import PATIENCE_S
from scripts import elastic_loop
from train_runs import environment

from dist_optim.testing import RankPool, assert_equal

SCRIPT = REPOSITORY / "tests" / "scripts" / "elastic_loop.py"
STOPS_AT = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def two_agents(output_dir: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two machines, as far as torchrun can tell, of one CPU rank each."""
    rendezvous = {
        **{"NNODES": "2", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "1", "LOCAL_ADDR": "localhost"},
        **{"RDZV_ENDPOINT": f"localhost:{free_port()}", "RDZV_ID": output_dir.parent.name, "SCRIPT": str(SCRIPT)},
    }
    command = [str(REPOSITORY / "launch" / "multinode.sh"), "--stops_at", str(STOPS_AT)]
    agents = []
    for number in range(2):
        with open(output_dir.parent / f"agent{number}.log", "wb") as log:
            agents.append(
                subprocess.Popen(
                    [*command, "--output_dir", str(output_dir)],
                    env={**environment(), **rendezvous},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield agents
    finally:
        for agent in agents:
            for process in [*psutil.Process(agent.pid).children(recursive=True)] if agent.poll() is None else []:
                process.kill()
            agent.kill()
            agent.wait()


def test_a_killed_worker_costs_nothing_but_time(two_ranks: RankPool, tmp_path: Path) -> None:
    """Of a script that imports little, and waits for the kill: `train.py` resumes in tests of its own."""
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    with two_agents(output_dir) as agents:
        deadline = time.monotonic() + PATIENCE_S
        while not (output_dir / "last").exists():
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents), logs(tmp_path)
            time.sleep(0.05)
        (worker,) = psutil.Process(agents[1].pid).children()
        worker.kill()
        for agent in agents:
            assert agent.wait(max(1.0, deadline - time.monotonic())) == 0, logs(tmp_path)
    assert logs(tmp_path).count("resuming from step 2") == 2
    two_ranks.run(elastic_loop.train, tmp_path)
    assert_equal(torch.load(output_dir / "end.pt"), torch.load(tmp_path / "end.pt"))


def logs(directory: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(directory.glob("agent*.log")))
