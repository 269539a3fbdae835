"""Container files: they install what continuous integration installs, by the same pinned file, in a sound order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, re.sub(r"\s+", " ", rest)) for name, rest in found]


def installed_by_ci() -> tuple[str, str]:
    """The extras of .ci/environment, and the Python that it takes before all others."""
    text = (ROOT / ".ci" / "environment").read_text()
    extras, version = (
        re.search(r'-e "\.\[(\S+)\]"', text),
        re.search(r"candidates=\(python(3\.\d+) ", text),
    )
    assert extras and version
    return extras[1], version[1]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_it_installs_what_continuous_integration_installs(self, path: Path) -> None:
        extras, version = installed_by_ci()
        steps = instructions(path)
        assert steps[0] == ("FROM", f"python:{version}-slim")
        assert any(f'-e ".[{extras}]"' in rest for name, rest in steps if name == "RUN")

    def test_every_install_is_pinned(self, path: Path) -> None:
        installs = [rest for name, rest in instructions(path) if name == "RUN" and "pip install" in rest]
        assert installs
        for line in installs:
            assert " -c constraints.txt " in line and "--no-cache-dir" in line, line
            assert not re.search(r"[=<>~]=\d", line), f"a version that constraints.txt does not know: {line}"

    def test_the_large_layer_does_not_depend_on_the_sources(self, path: Path) -> None:
        steps = instructions(path)
        first_install = next(at for at, (name, rest) in enumerate(steps) if name == "RUN" and "pip install" in rest)
        assert steps.index(("COPY", "constraints.txt ./")) < first_install < steps.index(("COPY", ". ."))

    def test_it_is_written_as_a_linter_wants_it(self, path: Path) -> None:
        steps = instructions(path)
        names = [name for name, _ in steps]
        known = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "CMD", "ENTRYPOINT", "USER"}
        assert set(names) <= known, "ADD and MAINTAINER have better replacements"
        for name, rest in steps:
            if name == "FROM":
                assert ":" in rest and not rest.endswith(":latest")
            if name == "WORKDIR":
                assert rest.startswith("/")
            if name in ("CMD", "ENTRYPOINT"):
                assert rest.startswith("["), "signals reach the program only in this form"
            if "apt-get install" in rest:
                assert "apt-get update &&" in rest and "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest
            assert not re.search(r"\bcd |\bsudo\b", rest)


def test_compose_builds_both_files_and_names_their_images() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert {service["build"]["dockerfile"] for service in services.values()} == {
        f"docker/{path.name}" for path in DOCKERFILES
    }
    for service in services.values():
        assert (ROOT / "docker" / service["build"]["context"]).resolve() == ROOT
        path = ROOT / service["build"]["dockerfile"]
        assert f"-t {service['image']} ." in path.read_text(), "the image's name in the file's own comment"
        workdir = dict(instructions(path))["WORKDIR"]
        assert f"../runs:{workdir}/runs" in service["volumes"]
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    mounted = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}
    assert {name for name in mounted if not name.startswith(".")} == set(compose["volumes"])


def test_what_is_built_here_stays_out_of_the_images() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".compat", "runs"} <= set(ignored)
