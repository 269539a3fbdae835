"""Verdicts that are kept: found again, proven again where anything differs, and no worse for a damaged file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import proof_traps as traps
import pytest
import torch
from torch import nn

from dist_optim.proving import cache
from dist_optim.proving import prove as proving
from dist_optim.specs.verdict import Verdict
from dist_optim.testing import prove

PROVEN = Verdict(
    name="SignMomentum",
    is_independent=True,
    reason="made up",
    ghosts="empty",
    unreached={"a.py": (3, 5)},
    evidence={"steps": {"long": 520}},
)


class Counted:
    """Stands in the place of a proof."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> Verdict:
        self.count += 1
        return PROVEN


@pytest.fixture
def proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "proofs"))
    counted = Counted()
    with mock.patch.object(proving, "_prove", counted), mock.patch.object(cache, "_in_process", {}):
        yield counted


def asked(model: nn.Module | None = None, cls: Any = traps.SignMomentum, **arguments: Any) -> Verdict:
    return prove(cls, model=model or nn.Linear(9, 8), **arguments)


def in_another_process() -> None:
    cache._in_process.clear()


def test_the_same_question_is_answered_from_memory_and_from_the_file(proofs: Counted) -> None:
    assert asked(lr=1e-2) is asked(lr=1e-2) and proofs.count == 1
    in_another_process()
    assert asked(lr=1e-2) == PROVEN and proofs.count == 1


def test_models_that_are_tried_alike_share_a_verdict(proofs: Counted) -> None:
    layers = [nn.Linear(200, 300), nn.Linear(300, 200), nn.Linear(200, 300), nn.Linear(300, 200)]
    asked(nn.Sequential(*layers))
    asked(nn.Sequential(*layers, nn.Linear(200, 400)))
    assert proofs.count == 1


def test_another_question_is_another_proof(proofs: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(lr=1e-2)
    asked(lr=2e-2)
    asked(nn.Linear(9, 8).bfloat16(), lr=1e-2)
    asked(nn.Linear(9, 8, bias=False), lr=1e-2)
    asked(cls=traps.UsesScratch, lr=1e-2)
    assert proofs.count == 5
    monkeypatch.setattr(torch, "__version__", "another")
    asked(lr=1e-2)
    assert proofs.count == 6
    monkeypatch.setattr(cache, "_file_digest", lambda name: "edited")
    asked(lr=1e-2)
    assert proofs.count == 7


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "x"}', '{"unreached": 3}'])
def test_a_damaged_file_is_as_none(damage: str, proofs: Counted, tmp_path: Path) -> None:
    asked()
    (file,) = (tmp_path / "proofs").iterdir()
    file.write_text(damage)
    in_another_process()
    assert asked() == PROVEN and proofs.count == 2
    in_another_process()
    assert asked() == PROVEN and proofs.count == 2


def test_a_folder_that_cannot_be_made_is_as_none(proofs: Counted, tmp_path: Path) -> None:
    (tmp_path / "proofs").write_text("a file")
    asked()
    in_another_process()
    asked()
    assert proofs.count == 2


def test_an_empty_variable_keeps_no_file(proofs: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked()
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv(cache.VARIABLE)
    in_another_process()
    asked()
    assert len(list((tmp_path / "cache" / "dist_optim" / "proofs").glob("*.json"))) == 1


def test_an_object_that_is_the_classs_own_default_is_told_by_its_source(proofs: Counted) -> None:
    asked(cls=traps.HasObjectDefault)
    in_another_process()
    assert asked(cls=traps.HasObjectDefault) == PROVEN and proofs.count == 1
    asked(cls=traps.HasObjectDefault, rule=object())
    asked(cls=traps.HasObjectDefault, rule=object())
    assert proofs.count == 3


def test_what_cannot_be_written_down_is_not_kept(proofs: Counted) -> None:
    class Local(traps.SignMomentum):
        def __init__(self, params: Any, lr: float = 1e-2, rule: Any = None) -> None:
            super().__init__(params, lr)

    asked(cls=Local, rule=object())
    asked(cls=Local, rule=object())
    assert proofs.count == 2
    asked(cls=Local)
    in_another_process()
    asked(cls=Local)  # of a class in a function another process may make another one
    assert proofs.count == 4
