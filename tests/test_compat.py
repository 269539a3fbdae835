"""docs/compat.md is measured with today's ranges and tests, and the README's commands take any Python of the range."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import measure_compat
import pytest
from compat import AS_PINNED, CHOSEN, ROOT, ROWS, Row, lower_bounds, project
from packaging.requirements import Requirement
from patience import PATIENCE_S

import dist_optim

MEASURE = "run `make compat` and commit what it writes"
SERVED = ("3.10", "3.11", "3.12", "3.13")


def stale(results: dict[str, Any]) -> list[str]:
    """Why these results are not today's."""
    now, found = measure_compat.declared(), []
    found += [f"other {key}" for key in now if results.get(key) != now[key]]
    rows = {row["name"]: row for row in results["rows"]}
    found += [f"{row.name} is not measured" for row in ROWS if row.name not in rows]
    for row in (row for row in ROWS if row.name in rows):
        versions, parts = rows[row.name]["versions"], rows[row.name]["parts"]
        held = [line.split(";")[0].split("==") for line in row.constraints().splitlines() if "; python" not in line]
        other = [name for name, pin in held if name in versions and not f"{versions[name]}.".startswith(f"{pin}.")]
        found += [f"{row.name}: other {name}" for name in other]
        found += [f"{row.name}: Python {versions['python']}"] * (not versions["python"].startswith(f"{row.python}."))
        bad = [part for part in CHOSEN if not parts.get(part, {}).get("passed") or parts[part]["failed"]]
        found += [f"{row.name}: {part} has not passed" for part in bad]
    return found


def test_results_are_of_todays_ranges_and_tests_and_all_have_passed() -> None:
    results = json.loads(measure_compat.RESULTS.read_text())
    assert not stale(results), MEASURE
    assert measure_compat.PAGE.read_text() == measure_compat.page(results), MEASURE
    for key, other in (("bounds", {"torch": "2.8"}), ("tests", {}), ("python", ">=3.9"), ("read", "")):
        assert stale({**results, key: other}), f"control: {key}"
    spoiled = copy.deepcopy(results)
    spoiled["rows"][0]["versions"]["torch"] = "2.13.0"
    spoiled["rows"][1]["parts"]["Trainer"]["failed"] = ["test"]
    assert stale(spoiled) == [f"{ROWS[0].name}: other torch", f"{ROWS[1].name}: Trainer has not passed"], "control"


def test_what_is_measured_as_pinned_has_its_pin_as_lowest_version() -> None:
    pins = dict(
        line.split(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    asked = " ".join(" ".join(one) for one in project()["optional-dependencies"].values())
    for name in AS_PINNED:
        (lowest,) = re.findall(rf"\b{name}>=([\d.]+)", asked)
        assert f"{pins[name]}.".startswith(f"{lowest}."), name


def collected(*tests: str) -> subprocess.CompletedProcess[str]:
    """What pytest finds of these, below `tests/`."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    asked = [f"tests/{test}" for test in tests]
    return subprocess.run([*command, *asked], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


def test_chosen_tests_exist() -> None:
    """With their parameters: pytest runs none of what it is given where it does not find all of it."""
    done = collected(*(test for tests in CHOSEN.values() for test in tests))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_optimizer_of_each_package_that_has_a_lowest_version_is_among_them() -> None:
    names = {re.split(r"[\[ ]", test)[1] for test in CHOSEN["optimizers"]}
    covered = {dist_optim.get_spec(name).package for name in names}
    packages = {dist_optim.get_spec(name).package for name in dist_optim.names()} & lower_bounds().keys()
    assert len(packages) > 6 and packages <= covered


def test_control_a_case_that_is_gone_is_seen() -> None:
    done = collected("test_compat.py::test_any_python_of_the_range_will_do[3.11]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert collected("test_compat.py::test_any_python_of_the_range_will_do[3.9]").returncode != 0


def test_every_bound_and_every_end_of_pythons_range_is_in_a_row() -> None:
    assert project()["requires-python"] == ">=3.10,<3.14"
    assert {row.python for row in ROWS} >= {"3.10", "3.12", "3.13"}
    lowest = ROWS[0].constraints().splitlines()
    assert lowest == [f"{name}=={version}" for name, version in lower_bounds().items()] and len(lowest) > 20
    assert "deepspeed==0.19.8\n" not in Row("", "3.11", ("deepspeed",)).constraints()


def test_outcomes_are_read_from_pytests_report() -> None:
    report = ElementTree.fromstring(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_cli" name="test_a"/>'
        '<testcase classname="tests.test_cli" name="test_b"><failure/></testcase>'
        '<testcase classname="tests.test_cli" name="test_c"><skipped message="no GPU"/></testcase>'
        '<testcase classname="" name="tests.test_parity"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    assert measure_compat.read_report(report) == {
        "passed": 1,
        "skipped": {"test_cli::test_c": "no GPU"},
        "failed": ["test_cli::test_b", "::tests.test_parity"],
    }


def make_python(folder: Path, version: str) -> Path:
    """An interpreter that says it is of this version, and whose environments note what pip is asked to install."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / f"python{version}"
    python.write_text(f"""#!/usr/bin/env bash
case "$1 $2" in
    "-c import ensurepip"*) exit $(({int(version.split(".")[1])} < 10 || {int(version.split(".")[1])} > 13)) ;;
    "-c import sys"*) echo "(3, {version.split(".")[1]})" ;;
    "--version "*) echo "Python {version}.0" ;;
    "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m pip") echo "{version} $*" >> asked.txt ;;
esac
""")
    python.chmod(0o755)
    return python


def prepare(folder: Path, *versions: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run .ci/environment where these Pythons alone are found."""
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci" / "environment", folder / ".ci")
    for version in versions:
        make_python(folder / "bin", version)
    for tool in ("bash", "cat", "cp", "dirname", "env", "mkdir", "rm", "sed", "tail", "touch"):
        if not (folder / "bin" / tool).exists():
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    given = {"PATH": str(folder / "bin"), **environment}
    script = [str(folder / ".ci" / "environment")]
    return subprocess.run(script, env=given, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("version", SERVED)
def test_any_python_of_the_range_will_do(version: str, tmp_path: Path) -> None:
    done = prepare(tmp_path, version)
    assert done.returncode == 0 and f"with Python {version}.0" in done.stdout, done.stderr
    asked = (tmp_path / "asked.txt").read_text()
    assert f"{version} -m pip install" in asked and "-c constraints.txt" in asked
    assert (tmp_path / ".venv" / ".stamp").exists()
    assert "creating" not in prepare(tmp_path, version, PYTHON=f"python{version}").stdout, "the same Python stays"


def test_no_other_python_is_taken_in_the_place_of_the_one_that_was_named(tmp_path: Path) -> None:
    done = prepare(tmp_path, "3.11", "3.14", PYTHON="python3.14")
    assert done.returncode == 1 and "tried: python3.14." in done.stderr
    done = prepare(tmp_path, "3.12", PYTHON="python3.12")
    assert "with Python 3.12.0" in done.stdout


def test_a_python_out_of_the_range_is_not_taken(tmp_path: Path) -> None:
    done = prepare(tmp_path, "3.9", "3.14")
    assert done.returncode == 1 and "No Python from 3.10 to 3.13" in done.stderr


@pytest.mark.parametrize("version", SERVED)
def test_every_package_has_one_pin_for_each_python(version: str) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": version})]
    assert len(names) == len(set(names)) > 60
    assert lower_bounds().keys() <= set(names)
