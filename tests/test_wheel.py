"""The wheel has what `dist-optim ls` lists, and `import dist_optim` works from it with torch alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_optim.planning import shipped

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "dist_optim", "configs", "launch")
ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import dist_optim
print(dist_optim.__file__)
from dist_optim.planning import shipped
print(shipped.root())
"""
BLOCKED = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "galore_torch", "matplotlib", "pytorch_optimizer"}
BLOCKED |= {"apollo_torch", "flashoptim", "grokadamw", "rich", "safetensors", "schedulefree", "tokenizers", "torchao"}
BLOCKED |= {"transformers", "trl", "typer", "yaml"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, and unpacked."""
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def in_site(site: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_that_is_listed_is_in_the_wheel(site: Path) -> None:
    for kind, paths in shipped.listed().items():
        for path in paths:
            packed = site / "dist_optim" / "shipped" / path.relative_to(ROOT)
            assert packed.read_bytes() == path.read_bytes(), kind
    assert (site / "dist_optim" / "proving" / "known.json").exists()


def test_it_imports_with_torch_alone(site: Path) -> None:
    said = in_site(site, f"BLOCKED = {BLOCKED!r}\n{ALONE}").split()
    assert said == [str(site / "dist_optim" / "__init__.py"), str(site / "dist_optim" / "shipped")]


def test_its_commands_list_and_copy(site: Path, tmp_path: Path) -> None:
    calls = [["ls"], ["cp", "train.py", str(tmp_path)]]
    program = f"from dist_optim.cli import app\nfor words in {calls!r}:\n    app(words, standalone_mode=False)"
    assert "accelerate/fsdp2.yaml" in in_site(site, program)
    assert (tmp_path / "train.py").read_bytes() == (ROOT / "launch" / "train.py").read_bytes()
