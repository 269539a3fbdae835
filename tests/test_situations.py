"""Every situation under every engine ends as docs/situations.json says: right, or refused on all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
from every_situation import EVERY_ROW
from failing_backward import HAS_WATCH, TITLE, outcomes
from measure_situations import PAGE, RESULTS, Row, as_row, defects, measure, page, titles
from sessions import ENGINES, HAS_DEEPSPEED, Engine
from situations import DEFECT, NOT_APPLICABLE, REFUSED, RIGHT, Outcome, Situation, cell
from stock_table import load

from dist_optim.building import composing
from dist_optim.checkpoint import engine_view, optimizer_content, run_state
from dist_optim.errors import CheckpointError, ParameterError
from dist_optim.integrations.accelerate import following, placing
from dist_optim.stepping import before_step, gradients, optimizer, presence, rank_state
from dist_optim.stepping.group_values import GroupValues
from dist_optim.stepping.parameter_guard import ParameterGuard
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.testing import RankPool

MEASURE = "run `make parity` and commit what it writes"
BY_TITLE = {situation.title: situation for situation in EVERY_ROW}
BY_ENGINE = {engine.title: engine for engine in ENGINES}


@pytest.fixture(scope="module")
def results() -> dict[str, Row]:
    loaded: dict[str, Row] = json.loads(RESULTS.read_text())
    return loaded


@pytest.fixture
def pool_of(one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


def rows_of(engine: Engine) -> list[Situation]:
    """Of each row every third engine that it is for, at least one, each time another third; all of them: MEASURE."""
    chosen = []
    for number, row in enumerate(EVERY_ROW):
        engines = [one for one in ENGINES if one.title not in row.not_for]
        if engine in engines[number % min(3, len(engines)) :: 3]:
            chosen.append(row)
    return chosen


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.title)
def test_every_situation_ends_as_recorded(
    engine: Engine, pool_of: dict[int, RankPool], results: dict[str, Row]
) -> None:
    if engine.is_zero and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    pool = pool_of[engine.num_ranks]
    found = {one.title: as_row({engine.title: measure(one, engine, pool)}) for one in rows_of(engine)}
    assert not defects(found)
    assert found == {title: {engine.title: results[title][engine.title]} for title in found}, MEASURE


@pytest.mark.skipif(not HAS_WATCH, reason="ranks do not watch each other yet")
def test_a_rank_that_fails_in_backward_ends_the_others_and_is_named(results: dict[str, Row]) -> None:
    engines = [BY_ENGINE[title] for title in ("DDP", "FSDP2", *(["ZeRO-2"] if HAS_DEEPSPEED else []))]
    found = as_row(outcomes(engines))
    assert found == {engine.title: results[TITLE][engine.title] for engine in engines}, MEASURE


def test_every_row_is_run_under_an_engine() -> None:
    assert {row.title for engine in ENGINES for row in rows_of(engine)} == {row.title for row in EVERY_ROW}


def test_page_is_what_the_results_give_and_has_every_cell(results: dict[str, Row]) -> None:
    assert PAGE.read_text() == page(results, load()), MEASURE
    assert list(results) == titles(), MEASURE
    assert all(list(row) == list(BY_ENGINE) for row in results.values()), MEASURE
    assert not defects(results)
    for row in EVERY_ROW:
        cells = results[row.title].items()
        assert {engine: one["text"] for engine, one in cells if one["kind"] == NOT_APPLICABLE} == row.not_for, MEASURE
    kinds = [outcome["kind"] for row in results.values() for outcome in row.values()]
    assert kinds.count(RIGHT) > 90 and kinds.count(REFUSED) > 30 and kinds.count(NOT_APPLICABLE) < len(kinds) / 3


@pytest.mark.parametrize(
    ("kind", "text"), [(DEFECT, "it hung"), ("quietly wrong", ""), (REFUSED, "")], ids=["defect", "other", "no text"]
)
def test_a_third_outcome_is_noticed(kind: str, text: str, results: dict[str, Row]) -> None:
    row = {**results["evaluated, then trained"], "FSDP2": {"kind": kind, "text": text}}
    (problem,) = defects({**results, "evaluated, then trained": row})
    assert problem.startswith("evaluated, then trained, FSDP2")


# Negative controls: each row sees the defect that it is there for -----------------------------------------------------


def write_without_clearing(self: UpstreamInstance, index: int, encoded: Any, **options: Any) -> None:
    if encoded:
        _write_encoded_state(self, index, encoded, **options)


_write_encoded_state = UpstreamInstance.write_encoded_state


def keep_the_counters(self: GroupValues, counters: Any) -> None:
    vars(self)["why_unheard"] = lambda *_: ""  # which says so at the next step otherwise


def agree_on_presence_alone(
    self: presence.StepAgreement, names: Any, has: Any, lacks: Any, values: Any = (), *rest: Any, **named: Any
) -> list[bool]:
    return _before(self, names, has, lacks, (), *rest, **named)


def agree_on_own_gradients(self: presence.StepAgreement, names: Any, has: Any, *rest: Any, **named: Any) -> list[bool]:
    return _before(self, names, has, [False] * len(has), *rest[1:], **named)


_before = presence.StepAgreement.before


def forget(self: presence.StepAgreement, name: str, num_steps: int) -> None:
    self._failure = None


def no_samples(self: gradients.GradientSamples, num_steps: int) -> list[int | None]:
    return [None] * sum(one.num_parts for one in self._sets)


def no_trained_weights_of_what_is_frozen_now(view: Any) -> Any:
    held = view.optimizer.holdings
    placed = [replace(one, is_trained=one.parameter.requires_grad) for one in held.placed]
    with mock.patch.object(view.optimizer, "holdings", replace(held, placed=tuple(placed))):
        return _separate_weights(view)


_separate_weights = optimizer_content._separate_weights


def marked_by_a_number(groups: Any, num_steps: int, mode: str) -> None:
    groups[0] |= {"dist_optim_num_steps": num_steps}


BREAKS: dict[str, tuple[object, str, object]] = {
    # The package has a function of the module's name.
    "detect does not reshard": (import_module("dist_optim.layouts.detect"), "reshard", lambda model: None),
    "install does not clear": (UpstreamInstance, "write_encoded_state", write_without_clearing),
    "install keeps the counters": (GroupValues, "write_counters", keep_the_counters),
    "failures are forgotten": (presence.StepAgreement, "after", forget),
    "rates are not compared": (presence.StepAgreement, "before", agree_on_presence_alone),
    "presence is not compared": (presence.StepAgreement, "before", agree_on_own_gradients),
    "whole gradients on shards pass": (before_step, "odd_gradient", lambda *_: None),
    "what is trained is asked anew": (
        optimizer_content,
        "_separate_weights",
        no_trained_weights_of_what_is_frozen_now,
    ),
    "half steps are saved": (run_state, "refuse_half_step", lambda optimizer, weights: None),
    "gradients are not looked at": (before_step, "first_nonfinite", lambda placed: None),
    "a plain scaler passes": (optimizer, "refuse_local_scaler", lambda held, caller: None),
    "Join passes": (ParameterGuard, "_refuse_join", lambda self: None),
    "gradients are not sampled": (gradients.GradientSamples, "take", no_samples),
    "sparse embeddings pass": (composing, "refuse_sparse_embeddings", lambda model, groups: None),
    "steps are a number": (rank_state, "marked", marked_by_a_number),
    "groups are not followed": (following, "_successor_of", lambda parameter: parameter),
    "uneven inputs pass": (placing, "guard_calls", lambda accelerator: None),
}


@contextmanager
def broken(name: str) -> Iterator[None]:
    owner, attribute, replacement = BREAKS[name]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(owner, attribute, replacement))
        if name == "detect does not reshard":  # a load looks at its engine besides, for the same reason
            stack.enter_context(mock.patch.object(engine_view.PlainView, "look", lambda view: None))
        yield


def cell_of_broken_code(name: str, title: str, engine: Engine) -> Outcome:
    """The body: the same cell, with the code broken on every rank; a refusal of what is right is a defect too."""
    try:
        with broken(name):
            return cell(BY_TITLE[title], engine)
    except (CheckpointError, ParameterError, KeyError) as error:
        return Outcome(DEFECT, str(error))


CONTROLS = [
    ("detect does not reshard", "mixed precision, evaluated, then saved", "FSDP2"),
    ("detect does not reshard", "evaluated, then loaded", "FSDP2"),
    ("detect does not reshard", "evaluated, then loaded", "HSDP"),
    ("install does not clear", "loaded from before the first step", "DDP"),
    ("install does not clear", "loaded from before a layer's first gradient", "FSDP2"),
    ("install keeps the counters", "loaded onto a used optimizer", "FSDP1"),
    ("failures are forgotten", "one rank fails in the step", "DDP"),
    ("rates are not compared", "a learning rate differs on one rank", "HSDP"),
    ("presence is not compared", "a gradient is missing on one rank", "FSDP2"),
    ("gradients are not sampled", "gradients not reduced in a later step", "DDP"),
    ("gradients are not sampled", "a rank changes its reduced gradients", "HSDP"),
    ("gradients are not sampled", "local SGD by DDP's hook", "DDP"),
    ("what is trained is asked anew", "saved and resumed while a layer is frozen", "FSDP2"),
    ("half steps are saved", "one rank fails in the step", "DDP"),
    ("half steps are saved", "upstream fails on a NaN gradient, and the run is saved", "FSDP2"),
    ("gradients are not looked at", "an infinite gradient on one rank, raised", "DDP"),
    ("gradients are not looked at", "an infinite gradient on one rank, skipped", "HSDP"),
    ("a plain scaler passes", "loss scaling, an overflow on one rank", "FSDP1"),
    ("Join passes", "a step inside torch's Join", "DDP"),
    ("whole gradients on shards pass", "gradients not reduced in a later step", "FSDP1"),
    ("sparse embeddings pass", "a sparse embedding", "DDP"),
    ("groups are not followed", "accelerate: groups of the plain model", "FSDP2"),
    ("steps are a number", "gone on with by plain torch", "one process"),
    ("uneven inputs pass", "accelerate: uneven inputs (join_uneven_inputs)", "FSDP2"),
    *([("gradients are not sampled", "gradients not reduced in a later step", "ZeRO-0")] if HAS_DEEPSPEED else []),
]


@pytest.mark.parametrize(("name", "title", "engine"), CONTROLS)
def test_broken_code_is_seen(name: str, title: str, engine: str, pool_of: dict[int, RankPool]) -> None:
    pool = pool_of[BY_ENGINE[engine].num_ranks]
    found = pool.run(cell_of_broken_code, name, title, BY_ENGINE[engine])
    assert {outcome.kind for outcome in found} == {DEFECT}, found
