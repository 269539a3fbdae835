"""What the documents say can be done: code compiles and runs, links and named tests exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

from dist_optim import errors
from train_arguments import read_arguments

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "configs" / "README.md", *(ROOT / "docs").rglob("*.md")])
ADDING = ROOT / "docs" / "adding-an-optimizer.md"


def code_blocks(document: Path) -> list[str]:
    """The python blocks of a document, in order."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_compile(document: Path) -> None:
    for number, block in enumerate(code_blocks(document)):
        compile(block, f"{document.name}, block {number}", "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_exist(document: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", document.read_text()) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document: Path) -> None:
    """Paths in backquotes that start in one of our folders."""
    pattern = r"`((?:dist_optim|launch|configs|tests|tests_multigpu|docs|docker|benchmarks)/[\w./-]+)`"
    named = re.findall(pattern, document.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_headings_exist(document: Path) -> None:
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", document.read_text()) if "://" not in link]
    missing = []
    for path, _, anchor in links:
        target = document.parent / path if path else document
        if anchor and anchor not in anchors(target):
            missing.append(f"{path}#{anchor}")
    assert not missing


def anchors(document: Path) -> set[str]:
    """The links that headings get: lower case, without punctuation, words joined by dashes."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(document: Path) -> list[list[str]]:
    """The command lines of a document's blocks that have no language, in words, comments and a last "..." left out."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\w+=\S+ )*(accelerate|torchrun|deepspeed|python|make|dist-optim|sbatch|docker)\b", line):
                found.append([word for word in shlex.split(line, comments=True) if word != "..."])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_files_and_flags_that_exist(document: Path) -> None:
    for words in commands(document):
        files = [word for word in words if re.match(r"(configs|launch|docker|docs|tests)/", word)]
        assert not [word for word in files if not (ROOT / word).exists()], words
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        if "launch/train.py" in words:
            flags = words[words.index("launch/train.py") + 1 :]
            read_arguments(flags)


def test_the_readme_is_the_door_and_no_more() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 220
    assert len(commands(ROOT / "README.md")) >= 4, "or the test above sees nothing"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        reached.add(document)
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+\.md)[)#]", document.read_text())]
        waiting += {(document.parent / link).resolve() for link in links if "://" not in link} - reached
    assert not set(DOCUMENTS) - reached


QUICK_STARTS = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

def make_model():
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes))

data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
for block in BLOCKS:
    model = make_model()
    given = {"model": model, "data": data}
    exec(block, given)
    if "trainer" in given:
        given["trainer"].args.max_steps = 1
        given["trainer"].train()
    elif "optimizer" in given:
        given["model"](**{k: v[None].to(given["model"].device) for k, v in data[0].items()}).loss.backward()
        given["optimizer"].step()
    print("block done")
"""


def test_the_quick_starts_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    """In one process, each on a model of its own."""
    blocks = code_blocks(ROOT / "README.md")
    if importlib.util.find_spec("deepspeed") is None:
        blocks = [block for block in blocks if "deepspeed" not in block]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = f"BLOCKS = {blocks!r}\n{QUICK_STARTS}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("block done") == len(blocks) >= 3


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is errors.DistOptimError:
            continue
        builtin = next(base.__name__ for base in kind.__mro__ if base.__module__ == "builtins")
        assert re.search(rf"^\| \[{name}\]\(#\S+\) \| `{builtin}` \|", text, flags=re.MULTILINE), name


def test_every_defect_names_tests_that_exist() -> None:
    for line in (ROOT / "docs" / "upstream-defects.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line.rpartition(" | ")[2])
        assert named, f"no test is named: {line}"
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


def _as_test(code: str) -> str:
    return "def test_it():\n" + "".join(f"    {line}\n" for line in code.splitlines())


def test_example_of_adding_an_optimizer_runs(tmp_path: Path) -> None:
    module, proof, check = code_blocks(ADDING)
    (tmp_path / "sign_norm.py").write_text(module)
    (tmp_path / "test_sign_norm.py").write_text(check)
    (tmp_path / "test_independence.py").write_text(_as_test("from sign_norm import SignNorm\n" + proof))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
