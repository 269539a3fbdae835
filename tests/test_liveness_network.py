"""`launch/multinode.sh` on two hosts with a cable between them: to the end, and until the cable is cut.

The hosts are namespaces of this machine (network, host name, process ids, /etc/hosts), joined by a veth pair. All
addresses are inside them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch_files import REPOSITORY
from patience import PATIENCE_S
from train_runs import environment

pytestmark = pytest.mark.timeout(PATIENCE_S + 100)

RANK_TIMEOUT_S = 10
CABLE = "cable"
FLAGS = (
    *("--optim", "adamw_torch", "--learning_rate", "1e-3", "--use_cpu", "--per_device_train_batch_size", "2"),
    *("--max_eval_samples", "6", "--block_size", "64", "--eval_steps", "100000", "--disable_tqdm"),
)
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Host:
    """A network namespace, with what it takes to run a program as if on a machine of its own."""

    namespace: str
    name: str
    address: str
    hosts_file: Path

    def start(self, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        alone = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = ["sh", "-c", ENTER, "sh", self.name, str(self.hosts_file), *command]
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *alone, *inside],
                env={**environment(), "GLOO_SOCKET_IFNAME": CABLE, "LOCAL_ADDR": self.address, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def unplug(self) -> None:
        _ip("-n", self.namespace, "link", "set", CABLE, "down")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("two hosts on one machine need iproute2 and util-linux")
    hosts_file = tmp_path / "hosts"
    names, addresses = ("first-host", "second-host"), ("10.77.0.1", "10.77.0.2")
    hosts_file.write_text("127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, addresses, names)))
    spaces = [f"dist-optim-{os.getpid()}-{number}" for number in range(2)]
    try:
        try:
            for space in spaces:
                _ip("netns", "add", space)
        except OSError as error:
            pytest.skip(f"two hosts on one machine need root ({error})")
        _ip("link", "add", CABLE, "netns", spaces[0], "type", "veth", "peer", "name", CABLE, "netns", spaces[1])
        for space, address in zip(spaces, addresses, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", space, "link", "set", CABLE, "up")
        first, second = (Host(*given, hosts_file) for given in zip(spaces, names, addresses, strict=True))
        yield first, second
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


@dataclass(frozen=True)
class Job:
    """One agent on each host, of one rank each."""

    agents: list[subprocess.Popen[bytes]]
    directory: Path

    def exit_codes(self) -> list[int]:
        deadline = time.monotonic() + PATIENCE_S
        try:
            return [agent.wait(max(0.1, deadline - time.monotonic())) for agent in self.agents]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.logs()}\nstill runs") from None

    def logs(self) -> str:
        return "\n".join(f"--- host {number}\n{self.log(number)}" for number in range(2))

    def log(self, number: int) -> str:
        return (self.directory / f"host{number}.log").read_text(errors="replace")


Starter = Callable[..., Job]


@pytest.fixture
def start(two_hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Starter]:
    jobs: list[Job] = []

    def start(*flags: str) -> Job:
        variables = {
            **{"NNODES": "2", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "0", "RDZV_ID": "two-hosts"},
            **{"RDZV_ENDPOINT": f"{two_hosts[0].address}:29400", "DIST_OPTIM_RANK_TIMEOUT_S": str(RANK_TIMEOUT_S)},
        }
        script = str(REPOSITORY / "launch" / "multinode.sh")
        command = [script, *FLAGS, "--output_dir", str(tmp_path / "run"), *flags]
        agents = [
            host.start(command, tmp_path / f"host{number}.log", **variables) for number, host in enumerate(two_hosts)
        ]
        jobs.append(Job(agents, tmp_path))
        return jobs[-1]

    yield start
    for job in jobs:
        for agent in job.agents:
            agent.kill()
            agent.wait()


def test_two_hosts_train_to_the_end(start: Starter, tmp_path: Path) -> None:
    job = start("--max_steps", "6")
    assert job.exit_codes() == [0, 0], job.logs()
    assert (tmp_path / "run" / "summary.json").exists()
    assert "heard from" not in job.logs() and "without a word" not in job.logs()


def test_both_sides_end_when_the_cable_is_cut(start: Starter, two_hosts: tuple[Host, Host], tmp_path: Path) -> None:
    job = start("--max_steps", "100000", "--save_steps", "4")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "run" / "checkpoint-4").exists():
        assert time.monotonic() < deadline and all(agent.poll() is None for agent in job.agents), job.logs()
        time.sleep(0.1)
    two_hosts[1].unplug()
    codes = job.exit_codes()
    assert all(code != 0 for code in codes), job.logs()
    for number, lost in ((0, "second-host"), (1, "first-host")):
        (said,) = (line for line in job.log(number).splitlines() if line.startswith("dist_optim: rank"))
        assert f"(host {lost}, pid " in said.split(" has not been heard from for 10 s")[0], job.logs()
    assert "This host's agent ends." in job.log(1) and "agent ends" not in job.log(0)
