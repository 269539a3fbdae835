"""Code that a proof did not reach raises when a step is about to run it, and nothing else does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any
from unittest import mock

import proof_traps as traps
import pytest
import torch
from torch import nn

import dist_optim
from dist_optim.errors import UnprovenCodeError, UnsupportedError
from dist_optim.proving.cache import VARIABLE
from dist_optim.specs.verdict import Verdict
from dist_optim.stepping import code_watch
from dist_optim.stepping.code_watch import CodeWatch
from dist_optim.testing import RankPool, prove


@pytest.fixture(params=["monitoring", "settrace"])
def _every_way(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "settrace":
        with mock.patch.object(code_watch.sys, "version_info", (3, 11)):
            yield
    elif sys.version_info < (3, 12):
        pytest.skip("sys.monitoring begins with Python 3.12")
    else:
        yield


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


def proven(cls: type[torch.optim.Optimizer]) -> Verdict:
    torch.manual_seed(0)
    return prove(cls, model=nn.Linear(7, 6), lr=1e-2)


def stepped(cls: type[traps.Plain], verdict: Verdict, *shape: int, steps: int = 3) -> Any:
    parameter = nn.Parameter(torch.ones(shape))
    optimizer, watch = cls([parameter]), CodeWatch(verdict)
    for _ in range(steps):
        parameter.grad = torch.ones(shape)
        with watch:
            optimizer.step()
    return parameter


@pytest.mark.usefixtures("_every_way")
def test_a_line_that_no_proof_has_reached_raises_before_it_runs() -> None:
    verdict = proven(traps.RareBranch)
    assert verdict.is_independent
    stepped(traps.RareBranch, verdict, 30, 40)
    with pytest.raises(UnprovenCodeError, match=r"proof_traps\.py:\d+, in update: .*total = sum") as caught:
        stepped(traps.RareBranch, verdict, 1001, 1000)
    assert isinstance(caught.value, UnsupportedError)
    assert "independent=False" in str(caught.value) and "independent=True" in str(caught.value)
    stepped(traps.RareBranch, verdict, 30, 40)


@pytest.mark.usefixtures("_every_way")
def test_a_function_that_no_proof_has_entered_raises() -> None:
    verdict = proven(traps.RareCall)
    with pytest.raises(UnprovenCodeError, match="in never_entered"):
        stepped(traps.RareCall, verdict, 1001, 1000)


@pytest.mark.usefixtures("_every_way")
def test_a_class_that_catches_everything_raises_all_the_same() -> None:
    verdict = proven(traps.CatchesAll)
    with pytest.raises(UnprovenCodeError, match="in never_entered"):
        stepped(traps.CatchesAll, verdict, 1001, 1000)


@pytest.mark.usefixtures("_every_way")
def test_the_same_code_may_run_outside_a_step_and_under_another_verdict() -> None:
    verdict = proven(traps.RareBranch)
    with pytest.raises(UnprovenCodeError):
        stepped(traps.RareBranch, verdict, 1001, 1000)
    everything_seen = Verdict(name="RareBranch", is_independent=True, reason="")
    stepped(traps.RareBranch, everything_seen, 1001, 1000)
    with pytest.raises(UnprovenCodeError):
        stepped(traps.RareBranch, verdict, 1001, 1000)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring begins with Python 3.12")
def test_what_has_been_seen_costs_nothing() -> None:
    verdict, asked = proven(traps.RareBranch), mock.Mock(side_effect=AssertionError)
    parameter = nn.Parameter(torch.ones(30, 40))
    optimizer, watch = traps.RareBranch([parameter]), CodeWatch(verdict)
    for step in range(4):
        parameter.grad = torch.ones(30, 40)
        with mock.patch.object(CodeWatch, "lines_in", asked if step >= 2 else CodeWatch.lines_in), watch:
            optimizer.step()
    assert not asked.called


def test_a_line_that_raises_needs_no_watch() -> None:
    verdict = proven(traps.RaisesForLarge)
    with pytest.raises(ArithmeticError, match="too large"):
        stepped(traps.RaisesForLarge, verdict, 1001, 1000)


def test_who_traces_already_goes_on_to() -> None:
    seen: list[str] = []

    def tracer(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "update":
            seen.append(event)
        return tracer

    with mock.patch.object(code_watch.sys, "version_info", (3, 11)):
        verdict = proven(traps.RareBranch)
        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            stepped(traps.RareBranch, verdict, 3, 4, steps=1)
            assert sys.gettrace() is tracer
        finally:
            sys.settrace(before)
    assert {"call", "line", "return"} <= set(seen)


def test_a_watch_that_sees_nothing_lets_the_line_through() -> None:
    """The watch is what raises: without its lines the same step runs."""
    verdict = proven(traps.RareBranch)
    with mock.patch.object(CodeWatch, "lines_in", lambda *_: None):
        stepped(traps.RareBranch, verdict, 1001, 1000)


def built_and_stepped() -> str:
    model = nn.Linear(1001, 1000)
    optimizer = dist_optim.build_optimizer(model, traps.RareBranch, lr=1e-2, print_audit=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except UnprovenCodeError as error:
        return str(error)
    return ""


def test_all_ranks_raise_where_one_reaches_it(two_ranks: RankPool) -> None:
    assert all("total = sum" in text for text in two_ranks.run(built_and_stepped))


def test_of_torch_nothing_is_watched() -> None:
    assert proven(torch.optim.NAdam).unreached == {}
