"""``dist-optim``: what it prints for people and for programs, and that it imports no upstream package for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from patience import PATIENCE_S
from typer.testing import CliRunner, Result

import dist_optim
from dist_optim import OptimizerSpec, Trait, UpstreamClass
from dist_optim.cli import app
from dist_optim.specs import registry

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})


@pytest.fixture
def odd_specs() -> Iterator[None]:
    """A refused optimizer, and one that nobody may sell, whose package is not installed."""
    base = OptimizerSpec(
        name="zz_refused",
        load=UpstreamClass("torch.optim", "SGD"),
        package="torch",
        traits=frozenset({Trait.ELEMENTWISE}),
        hyperparameters=dist_optim.get_spec("sgd").hyperparameters,
        licence="BSD-3-Clause",
        refusal="it waits for its driver. Use sgd.",
    )
    noncommercial = replace(
        base,
        name="zz_nc",
        load=UpstreamClass("no_such_module", "Nothing"),
        package="no-such-package",
        extra="nosuch",
        licence="CC-BY-NC-4.0",
        refusal="",
        needs=("CUDA",),
    )
    for spec in (base, noncommercial):
        dist_optim.register(spec)
    yield
    for name in ("zz_refused", "zz_nc"):
        del registry._specs[name]


@pytest.mark.parametrize("columns", [80, 200])
def test_list_has_one_line_a_name_and_fits_the_terminal(columns: int) -> None:
    result = run("list", columns=columns)
    assert result.exit_code == 0
    words = result.stdout.split()
    lines = {
        line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line[:2].isspace() and line.strip()
    }
    assert [name for name in dist_optim.names() if name not in lines] == []
    assert len(result.stdout.splitlines()) < len(dist_optim.names()) + 40
    assert lines["adamw_torch"][:2] == ["8", "all"] and lines["galore_adamw"][0] == "0.375"
    assert all(0 <= float(lines[name][0]) <= 24 for name in dist_optim.names())
    assert {dist_optim.get_spec(name).package for name in dist_optim.names()} <= set(words)
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_the_strategies_are_those_that_were_measured() -> None:
    table = (ROOT / "README.md").read_text().partition("table: begin")[2].partition("table: end")[0]
    columns, *rows = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)
    engines = [column.split()[0] for column in columns.split(" | ")]
    listed = {one["name"]: one["inside_backward_only"] for one in json.loads(run("list", "--json").stdout)}
    for row in rows[1:]:
        name, *cells = row.replace("`", "").split(" | ")
        served = {engine for engine, cell in zip(engines[1:], cells, strict=True) if cell != "refused"}
        assert listed[name] == ("FSDP1" not in served or "ZeRO" not in served), name
        assert {"DDP", "FSDP2", "HSDP"} <= served


def test_list_marks_what_is_refused_missing_and_not_for_commerce(odd_specs: None) -> None:
    lines = run("list", columns=120).stdout.splitlines()
    (heading,) = [line for line in lines if line.startswith("no-such-package")]
    assert "NON-COMMERCIAL USE ONLY" in heading
    assert "not installed: pip install 'dist-optim[nosuch]'" in heading
    (refused,) = [line for line in lines if "zz_refused" in line]
    assert "refused" in refused.split()
    (needy,) = [line for line in lines if "zz_nc" in line]
    assert "CUDA" in needy and "refused" not in needy


def test_commercial_licences_are_not_marked() -> None:
    described = json.loads(run("list", "--json").stdout)
    marked = {one["package"] for one in described if one["non_commercial"]}
    assert marked == {"apollo-torch"}


@pytest.mark.parametrize("columns", [80, 200])
def test_one_optimizer_shows_every_hyperparameter_with_type_default_and_meaning(columns: int) -> None:
    result = run("list", "galore_adamw", columns=columns)
    spec = dist_optim.get_spec("galore_adamw")
    words = " ".join(result.stdout.split())
    assert spec.paper in words and spec.summary in words and "target_modules" in words
    for record in spec.records():
        (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [record.name]]
        assert repr(record.default) in line
    assert "float >= 0" in words and "dimension of the" in words


def test_one_optimizer_shows_its_refusal_and_how_to_install_it(odd_specs: None) -> None:
    assert "it waits for its driver. Use sgd." in run("list", "zz_refused").stdout
    assert "pip install 'dist-optim[nosuch]'" in run("list", "zz_nc", columns=120).stdout


def test_an_unknown_name_exits_2_with_the_error_alone() -> None:
    result = run("list", "galor_adamw")
    assert result.exit_code == 2 and result.stdout == ""
    assert "There is no optimizer named 'galor_adamw'. The nearest names are: galore_adamw" in result.stderr
    assert "Traceback" not in result.output


def test_json_holds_what_a_program_needs(odd_specs: None) -> None:
    described = {one["name"]: one for one in json.loads(run("list", "--json").stdout)}
    assert sorted(described) == dist_optim.names()
    assert described["sgd"]["installed"] and described["sgd"]["install"] is None
    assert not described["zz_nc"]["installed"] and described["zz_nc"]["non_commercial"]
    assert described["zz_refused"]["refusal"]
    one = json.loads(run("list", "galore_adamw", "--json").stdout)
    rank = next(record for record in one["hyperparameters"] if record["name"] == "rank")
    assert (rank["default"], rank["minimum"], rank["maximum"], rank["scope"]) == (128, 1, None, "matrix")


def test_every_optimizer_can_be_shown() -> None:
    for name in dist_optim.names():
        result = run("list", name)
        assert result.exit_code == 0, f"{name}: {result.output}"
        assert json.loads(run("list", name, "--json").stdout)["name"] == name


def test_help_and_version() -> None:
    assert run("--version").stdout.split() == ["dist-optim", dist_optim.__version__]
    assert "list" in run("--help").stdout
    assert "--json" in run("list", "--help").stdout
    assert "Usage" in run().output


def test_listing_imports_no_upstream_package() -> None:
    """Importing them takes seconds, and some change logging or need a GPU when imported."""
    code = (
        "import sys; from typer.testing import CliRunner; from dist_optim.cli import app; import dist_optim\n"
        "assert CliRunner().invoke(app, ['list']).exit_code == 0\n"
        "for name in dist_optim.names(): assert CliRunner().invoke(app, ['list', name]).exit_code == 0\n"
        "upstream = ['galore_torch', 'apollo_torch', 'flashoptim', 'lomo_optim', 'grokadamw', 'schedulefree',\n"
        "            'optimi', 'bitsandbytes', 'torchao', 'transformers', 'accelerate']\n"
        "print([module for module in upstream if module in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
