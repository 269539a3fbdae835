"""Damaged checkpoints, hundreds of them: each is refused with nothing changed, or it loads the right state."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any
from unittest import mock

import damage
import pytest
import torch.distributed as dist
from damage import Damage
from damaged_indexes import of_indexes
from damaged_runs import Alone, Outcome, Subject, outcome_of

from dist_optim.ranks.agreement import gather_objects
from dist_optim.testing import RankPool

State = Any


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    Subject().save(folder)
    return folder


def outcomes(
    whole: Path,
    folder: Path,
    damages: Iterable[Damage],
    others: Mapping[str, State] | None = None,
    kind: type[Subject] = Subject,
) -> dict[str, Outcome]:
    """What loads of damaged copies did.

    Args:
        whole: What is damaged.
        folder: Where to.
        damages: What happens to the copies, one by one.
        others: States of the other checkpoints that parts are of.
        kind: What is loaded into.
    """
    subject, found = kind(), dict[str, Outcome]()
    subject.load(whole)
    expected = subject.everything()
    subject.train()
    for one in damages:
        if not dist.is_initialized() or dist.get_rank() == 0:
            one.of(whole, folder / "damaged")
        _wait()
        right = [expected, *([others[one.other]] if others and one.other in others else [])]
        found[str(one)] = outcome_of(subject, folder / "damaged", right)
        _wait()
        if not found[str(one)].kind.startswith("refused"):
            subject.load(whole)
            subject.train()  # so that the next one finds something to change
    assert outcome_of(subject, whole, [expected]) == Outcome("harmless"), "the control: the whole one loads"
    return found


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def wrong(found: Mapping[str, Outcome]) -> list[str]:
    return [f"{what}: {one.kind} {one.text}" for what, one in found.items() if not one.is_good]


def assert_all_good(found: Mapping[str, Outcome], at_least: int) -> None:
    problems = wrong(found)
    assert not problems, "\n".join([f"{len(problems)} of {len(found)}:", *problems])
    counts = Counter(one.kind for one in found.values())
    assert counts.total() >= at_least and counts["refused"] > 0.7 * at_least, counts


def test_bits_zeros_and_lengths(whole: Path, tmp_path: Path) -> None:
    found = outcomes(whole, tmp_path, chain(damage.of_bytes(whole), damage.of_tensors(whole)))
    assert_all_good(found, at_least=170)


def test_files_that_are_missing_or_no_files(whole: Path, tmp_path: Path) -> None:
    assert_all_good(outcomes(whole, tmp_path, damage.of_files(whole)), at_least=80)


def test_an_optimizer_alone(tmp_path: Path) -> None:
    Alone().save(tmp_path / "alone")
    damages = chain(damage.of_bytes(tmp_path / "alone"), damage.of_files(tmp_path / "alone"))
    found = outcomes(tmp_path / "alone", tmp_path, damages, kind=Alone)
    assert_all_good(found, at_least=80)


def test_parts_of_other_checkpoints(whole: Path, tmp_path: Path) -> None:
    later = Subject()
    later.train()
    runs = {
        "another step": later,
        "another run": Subject(seed=1),
        "another optimizer": Subject("adamw_torch"),
        "another model": Subject(width=4),
    }
    folders = {label: tmp_path / label for label in runs}
    for label, run in runs.items():
        run.save(folders[label])
    states = {label: runs[label].everything() for label in ("another step", "another run")}
    assert_all_good(outcomes(whole, tmp_path, damage.of_others(whole, folders), states), at_least=90)


def test_json_with_wrong_content(whole: Path, tmp_path: Path) -> None:
    found = outcomes(whole, tmp_path, damage.of_records(whole, num_sealed=150))
    numbers = ("optimizer/optimizer.json: scalars.", "optimizer/optimizer.json: param_groups.")
    for what, one in found.items():  # who forges digests may write any other number that the optimizer takes
        if one.kind == "accepted, with another state" and what.startswith(numbers) and damage.FORGED in what:
            found[what] = Outcome("harmless")
    assert_all_good(found, at_least=350)
    assert not [text for one in found.values() if "failed with" in (text := one.text)], "an error that is not ours"


def test_indexes_rewritten(whole: Path, tmp_path: Path) -> None:
    found = outcomes(whole, tmp_path, of_indexes())
    assert_all_good(found, at_least=120)
    assert {one.kind for one in found.values()} == {"refused"}


def test_code_in_every_file(whole: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    found = outcomes(whole, tmp_path, damage.with_code(whole, marker))
    assert_all_good(found, at_least=24)
    assert {one.kind for one in found.values()} == {"refused"} and not marker.exists()


# Two ranks ----------------------------------------------------------------------------------------------------------


def some_of_all(whole: Path, marker: Path) -> Iterator[Damage]:
    """A selection, and all that one rank alone meets."""
    yield from (Damage(f"{what} ranks/{rank}.pt", act) for rank in (0, 1) for what, act in damage.of_one(rank))
    every = [damage.of_bytes(whole), damage.of_files(whole), damage.of_records(whole, 30), of_indexes()]
    yield from islice(chain(*every), 0, None, 12)
    yield from islice(damage.with_code(whole, marker), 0, None, 3)


def ranks_end_alike(whole: Path, folder: Path) -> None:
    marker = folder / "executed"
    if dist.get_rank() == 0:
        folder.mkdir()
    Subject().save(whole)
    damages = list(some_of_all(whole, marker)) if dist.get_rank() == 0 else []
    found = outcomes(whole, folder, gather_objects(damages)[0])
    assert_all_good(found, at_least=50)
    kinds = [{what: one.kind for what, one in own.items()} for own in gather_objects(found)]
    assert kinds[0] == kinds[1] and not marker.exists(), kinds


def test_two_ranks_end_alike(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(ranks_end_alike, tmp_path / "run", tmp_path / "damaged")


# Controls -----------------------------------------------------------------------------------------------------------


def test_control_without_seals_damaged_tensors_are_accepted(whole: Path, tmp_path: Path) -> None:
    with (
        mock.patch("dist_optim.checkpoint.run_state.check_files"),
        mock.patch("dist_optim.checkpoint.optimizer_state.check_files"),
    ):
        found = outcomes(whole, tmp_path, damage.of_tensors(whole))
    assert any("accepted, with another state" in problem for problem in wrong(found))


def test_control_without_digests_parts_of_another_step_are_accepted(whole: Path, tmp_path: Path) -> None:
    later = Subject()
    later.train()
    later.save(tmp_path / "later")
    with (
        mock.patch("dist_optim.checkpoint.run_state.check_part"),
        mock.patch("dist_optim.checkpoint.run_state.check_same_save"),
    ):
        found = outcomes(whole, tmp_path, damage.of_others(whole, {"another step": tmp_path / "later"}))
    assert any("accepted, with another state" in problem for problem in wrong(found))


def test_control_without_its_own_digest_a_record_may_say_something_else(tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        path = folder / "optimizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_steps": 7}))

    Alone().save(tmp_path / "alone")
    edited = [Damage("another number", edit)]
    assert not wrong(outcomes(tmp_path / "alone", tmp_path, edited, kind=Alone))
    with mock.patch("dist_optim.checkpoint.identity.digest_of_record", return_value=""):
        Alone().save(tmp_path / "alone")
        found = outcomes(tmp_path / "alone", tmp_path, edited, kind=Alone)
    assert any("accepted, with another state" in problem for problem in wrong(found))


def test_control_a_plain_unpickler_runs_the_payload(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(damage.Payload(tmp_path / "executed")))
    assert os.listdir(tmp_path) == ["executed"]
