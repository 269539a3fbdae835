"""The scripts of launch/examples run as they stand, on two CPU ranks, and learn."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch_files import REPOSITORY
from patience import PATIENCE_S
from train_runs import environment

EXAMPLES = REPOSITORY / "launch" / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", str(REPOSITORY / "configs/accelerate/fsdp2_cpu_2.yaml")),
]
LAUNCHERS = {"accelerate_loop.py": ACCELERATE, "torchrun_fsdp2.py": TORCHRUN, "deepspeed_engine.py": TORCHRUN}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_example_learns_and_leaves_a_checkpoint(name: str, tmp_path: Path) -> None:
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    done = subprocess.run(
        [*LAUNCHERS[name], str(EXAMPLES / name)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)$", done.stdout, flags=re.MULTILINE)]
    assert len(losses) >= 10 and losses[-1] < losses[0] - 0.2, losses
    assert "galore_adamw on 2 ranks" in done.stdout
    own = re.compile(r"dist_optim: |  |(step \d+: )?loss ")
    strange = [line for line in (done.stdout + done.stderr).splitlines() if line and not own.match(line)]
    assert strange == [], "lines that are not ours"
    assert any((tmp_path / "runs" / Path(name).stem).iterdir())


def test_every_example_is_run_by_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LAUNCHERS)
