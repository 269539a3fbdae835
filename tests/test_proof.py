"""What a proof says of classes that are traps, each in a way of its own, and of some that are none."""

from __future__ import annotations

from typing import Any
from unittest import mock

import proof_traps as traps
import pytest
import torch
from torch import nn

from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.generators import read_generators
from dist_optim.proving.cache import VARIABLE
from dist_optim.proving.trace import Tags
from dist_optim.specs.verdict import Verdict
from dist_optim.testing import RankPool, prove


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.LayerNorm(6)).to(dtype)


def proven(cls: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32, **arguments: Any) -> Verdict:
    return prove(cls, model=small(dtype), **{"lr": 1e-2, **arguments})


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        (traps.CouplesLate, "step 499"),
        (traps.BoundNeverBinds, "mixes tensors"),
        (traps.BoundForLargeGradients, "following what is read"),
        (traps.ClipsThroughItem, "following what is read"),
        (traps.ClipsThroughList, "following what is read"),
        (traps.StopsWhenOneIsClose, "following what is read"),
        (traps.ClipsThroughNumpy, "where none can follow"),
        (traps.CapturesMean, "mix"),
        (traps.StacksEqualShapes, "mix"),
        (traps.FirstTensorLeads, "following what is read"),
        (traps.ClipsGlobally, "mix"),
        (traps.CompiledClip, "mix"),
        (traps.NeverMoves, "no weight moves"),
        (traps.EvaluatesTwice, "evaluates the closure 2 times"),
        (traps.UsesScratch, "keeps outside the state"),  # which tensor wrote it last is seen in it, and saved
    ],
)
def test_what_depends_on_other_tensors_is_found(trap: type[torch.optim.Optimizer], reason: str) -> None:
    verdict = proven(trap)
    assert not verdict.is_independent and reason in verdict.reason and not verdict.refusal, verdict


@pytest.mark.parametrize("trap", [traps.BoundNeverBinds, traps.ClipsThroughItem, traps.ClipsGlobally])
def test_it_is_found_in_half_precision_at_a_small_rate(trap: type[torch.optim.Optimizer]) -> None:
    verdict = proven(trap, torch.bfloat16, lr=1e-5)
    assert not verdict.is_independent, verdict


@pytest.mark.parametrize("trap", [traps.DrawsLate, traps.DrawsForLarge, traps.DrawsInPython, traps.DrawsInNumpy])
def test_draws_are_found(trap: type[torch.optim.Optimizer]) -> None:
    verdict = proven(trap)
    assert not verdict.is_independent and verdict.draws and "draws random numbers" in verdict.reason


@pytest.mark.parametrize(
    ("cls", "dtype", "arguments"),
    [
        (torch.optim.NAdam, torch.float32, {"foreach": True}),
        (torch.optim.NAdam, torch.bfloat16, {"foreach": False}),
        (torch.optim.Rprop, torch.float32, {}),
        (traps.SignMomentum, torch.bfloat16, {}),
        (traps.ClipsEachByItem, torch.float32, {}),
        (traps.ClipsEachByItem, torch.bfloat16, {}),
        (traps.Averages, torch.float32, {}),
    ],
)
def test_what_is_independent_is_cleared(
    cls: type[torch.optim.Optimizer], dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    verdict = proven(cls, dtype, **arguments)
    assert verdict.is_independent and verdict.ghosts == "none" and not verdict.draws, verdict
    assert not verdict.steps_absent and not verdict.evidence["left out"] and verdict.evidence["saving"] == ""


@pytest.mark.parametrize(("name", "foreach"), [("AdamW", True), ("AdamW", False), ("Adafactor", False), ("SGD", True)])
def test_described_classes_of_torch_are_cleared_too(name: str, foreach: bool) -> None:
    class Undescribed(getattr(torch.optim, name)):  # type: ignore[misc]
        pass

    verdict = proven(Undescribed, foreach=foreach)
    assert verdict.is_independent and verdict.ghosts == "none", verdict


def test_positions_among_gradients_need_ghosts_that_have_some() -> None:
    verdict = proven(traps.CountsWithGradient)
    assert verdict.is_independent and verdict.ghosts == "with gradients"
    assert verdict.evidence["apart"]["none"] and verdict.evidence["apart"]["empty"]


def test_what_steps_absent_parameters_is_told() -> None:
    assert proven(traps.ReadsAbsentAsZero).steps_absent


def test_lbfgs_needs_a_closure_and_evaluates_it_often() -> None:
    verdict = proven(torch.optim.LBFGS)
    assert verdict.needs_closure and verdict.evaluations > 1 and not verdict.is_independent
    assert proven(torch.optim.NAdam).evaluations == 1


def test_what_communicates_by_itself_is_refused() -> None:
    verdict = proven(traps.Communicates)
    assert not verdict.is_independent and "communicates by itself" in verdict.refusal


def test_what_cannot_be_stepped_raises() -> None:
    with pytest.raises(UnsupportedError, match="SparseAdam cannot be tried out: .* dense gradients"):
        proven(torch.optim.SparseAdam)
    with pytest.raises(HyperparameterError, match="refuses its arguments"):
        proven(torch.optim.Rprop, etas=(2.0, 0.5))


def test_nothing_is_left_behind() -> None:
    before, gradient = read_generators(), torch.is_grad_enabled()

    class Fresh(traps.DrawsInPython):  # of which no verdict is kept
        pass

    assert proven(Fresh).draws
    assert before == read_generators() and torch.is_grad_enabled() == gradient


def test_a_blind_trace_lets_a_bound_that_never_binds_through() -> None:
    """The trace is what finds it: stepped apart, nothing differs."""

    class Unseen(traps.BoundNeverBinds):  # of which no verdict is kept
        pass

    with mock.patch.object(Tags, "of_all", lambda *_: 0):
        assert proven(Unseen).is_independent
    assert not proven(traps.BoundNeverBinds).is_independent


def test_verdicts_are_the_same_again() -> None:
    class Fresh(traps.SignMomentum):
        pass

    class Again(traps.SignMomentum):
        pass

    first, second = proven(Fresh), proven(Again)
    assert first.evidence == second.evidence and first.reason == second.reason


def proven_among_ranks() -> tuple[bool, str]:
    verdict = proven(traps.Communicates)
    return verdict.is_independent, verdict.refusal


def test_where_there_is_a_process_group_no_collective_is_started(one_rank: RankPool) -> None:
    ((is_independent, refusal),) = one_rank.run(proven_among_ranks)
    assert not is_independent and "allreduce" in refusal


def test_scalars_groups_and_their_order_are_tried_as_they_are() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.weight = nn.Parameter(torch.ones(9, 8))

    assert prove(traps.SignMomentum, model=Scaled()).is_independent
