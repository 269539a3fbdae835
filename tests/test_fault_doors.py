"""Saves through the Trainer and accelerate that are killed, or whose disk fails: a sample of ``make faults``."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from door_runs import ByAccelerate
from fault_sweep import FAULTS, KINDS, Sweep
from fresh import own_libraries
from measure_faults import PAGE, RESULTS, TWO_RANKS, versions, write_page
from two_rank_saves import problem_of

from dist_optim.errors import CheckpointError

SAMPLE = {"Trainer": 2, "accelerate": 4}
"""So many calls of a save, at each fault others."""


@pytest.fixture(scope="module", params=KINDS)
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Sweep]]:
    with own_libraries():
        yield request.param, Sweep(request.param, tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_one_of_both_or_what_is_refused(sweep: tuple[str, Sweep], fault: str) -> None:
    kind, made = sweep
    count, number = made.count(), SAMPLE[kind.split(",")[0]]
    numbers = {*range(list(FAULTS).index(fault), count, -(-count // number)), count - 1}
    found = made.at(fault, sorted(numbers))
    assert not found.problems
    assert found.before + found.after + found.refused == len(numbers)
    assert found.refused if kind == "accelerate, over an existing one" else found.before and not found.refused


def test_the_page_and_the_counts_are_those_of_make_faults(sweep: tuple[str, Sweep]) -> None:
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == write_page(results), "run `make faults`"
    every = [one for part in ("one process", "two ranks") for kind in results[part].values() for one in kind.values()]
    assert len(every) == len(KINDS) * len(FAULTS) + 2 * len(TWO_RANKS) and not any(one["problems"] for one in every)
    if results["versions"] == versions():
        kind, made = sweep
        assert {one["calls"] for one in results["one process"][kind].values()} == {made.count()}, "run `make faults`"


def test_files_that_the_disk_cuts_off_are_an_error(sweep: tuple[str, Sweep]) -> None:
    """The kernel's own error, also in what torch writes in C++ and safetensors in Rust."""
    kind, made = sweep
    for size in (50, 400, 1000):
        made.start()
        child = os.fork()
        if child == 0:
            code = 3
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                made.later.save(made.home)
                code = 2
            except CheckpointError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert made.found() == ("refused" if kind == "accelerate, over an existing one" else "before")


@pytest.mark.parametrize(
    ("door", "lost", "number"), [("Trainer", 0, 30), ("accelerate", 1, 3), ("Trainer, asynchronous_saves", 0, 40)]
)
def test_a_rank_that_is_lost_is_named_and_the_run_resumes(door: str, lost: int, number: int, tmp_path: Path) -> None:
    assert not problem_of(TWO_RANKS[door], tmp_path / "job", lost, number)


def test_control_a_state_without_its_record_would_load_as_a_mixture(tmp_path: Path) -> None:
    unsealed = "dist_optim.integrations.accelerate.state"
    with own_libraries(), mock.patch(f"{unsealed}.check_folder"), mock.patch(f"{unsealed}._take_apart"):
        made = Sweep("accelerate, over an existing one", tmp_path)
        assert made.run is ByAccelerate
        problems = made.at("kill -9", range(6, made.count(), 6)).problems
    assert any("a mixture loads" in one for one in problems), problems
