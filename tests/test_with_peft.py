"""test_peft.py, in a process that finds peft: others would import it with transformers, and take seconds more each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from patience import PATIENCE_S

APART = Path(sys.prefix) / "apart"
"""Where ``.ci/environment`` puts peft."""


@pytest.mark.skipif(find_spec("peft") is not None, reason="peft is everywhere here: test_peft.py runs by itself")
def test_all_of_it_passes() -> None:
    if not (APART / "peft").is_dir():
        pytest.skip("peft is not installed apart, as .ci/environment does")
    path = os.pathsep.join([str(APART), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_peft.py")),
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1]), done.stdout
