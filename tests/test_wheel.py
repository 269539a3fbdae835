"""The wheel has what `dist-optim ls` lists, works with torch alone, and with each extra has that extra's optimizers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from patience import PATIENCE_S

import dist_optim
from dist_optim.planning import shipped
from dist_optim.specs.registry import get_spec

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
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def in_site(site: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
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


EXTRAS = """
import json, os, sys, traceback
sys.path[:0] = sys.argv[1:]
import torch
from dist_optim.specs.registry import get_spec

for extra, (names, modules, folder) in json.load(sys.stdin).items():
    child = os.fork()
    if not child:
        try:
            sys.path.append(folder)
            for module in modules:
                __import__(module)
            for name in names:
                get_spec(name).load_class()
            print("good", extra, flush=True)
            os._exit(0)
        except BaseException:
            print(f"--- {extra}", file=sys.stderr)
            traceback.print_exc()
            print("bad", extra, flush=True)
            os._exit(1)
    os.waitpid(child, 0)
"""
MODULES_OF = {
    "deepspeed": ["dist_optim.integrations.deepspeed"],
    "lomo": ["lomo_optim"],
    "train": ["dist_optim.integrations.accelerate", "dist_optim.integrations.transformers.run_report"],
}
"""Of extras that bring no optimizer of ours, what they are for."""
OTHER_WAYS = {"dev", "all"}


def install(folder: Path, wheel: importlib.metadata.Distribution, extra: str = "") -> str:
    """Links to what pip would install with this extra of the wheel, metadata too, of what is installed here."""
    folder.mkdir()
    done: set[str] = set()
    todo = [(Requirement(line), extra) for line in wheel.requires or []]
    while todo:
        wanted, within = todo.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": within}):
            continue
        try:
            found = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [(Requirement(line), one) for line in found.requires or [] for one in wanted.extras]
        if found.name in done:
            continue
        done.add(found.name)
        todo += [(Requirement(line), "") for line in found.requires or []]
        for part in {path.parts[0] for path in found.files or []} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(Path(str(found.locate_file(part))))
    return str(folder)


def test_each_extra_is_all_that_its_optimizers_need(site: Path, tmp_path: Path) -> None:
    """As in an environment into which pip has installed the wheel with this extra, and nothing else."""
    (metadata,) = site.glob("*.dist-info")
    wheel = importlib.metadata.Distribution.at(metadata)
    extras = set(wheel.metadata.get_all("Provides-Extra") or []) - OTHER_WAYS
    of_extra = {
        extra: [name for name in dist_optim.names() if get_spec(name).extra == extra] for extra in sorted(extras)
    }
    assert all(names or extra in MODULES_OF for extra, names in of_extra.items())
    job = {
        extra: (names, MODULES_OF.get(extra, []), install(tmp_path / extra, wheel, extra))
        for extra, names in of_extra.items()
    }
    job["control"] = (["lion"], [], job["flash"][2])  # whose package that extra does not bring
    command = [sys.executable, "-I", "-S", "-c", EXTRAS, str(site), install(tmp_path / "none", wheel)]
    done = subprocess.run(command, input=json.dumps(job), cwd=site, capture_output=True, text=True, timeout=PATIENCE_S)
    said = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines() if line.startswith(("good", "bad"))}
    assert said.pop("control", None) == "bad" and "dist-optim[pytorch-optimizer]" in done.stderr
    assert said == {extra: "good" for extra in of_extra}, done.stderr
