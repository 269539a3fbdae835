"""The short form of ``make soak``, and that what the long one recorded is what it would measure now."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
from measure_soak import NUM_STEPS, RESULTS, RUNS, expected
from sessions import ENGINES, HAS_DEEPSPEED, Engine
from soak import script, soak

from dist_optim.checkpoint import run_state
from dist_optim.testing import RankFailure, RankPool

BY_TITLE = {engine.title: engine for engine in ENGINES}
SHORT: dict[str, Any] = {"seed": 0, "num_steps": 60, "density": 3.0}


@pytest.mark.parametrize(
    ("title", "name"), [("DDP", "galore_adamw"), ("FSDP2", "schedule_free_adamw"), ("ZeRO-2", "schedule_free_adamw")]
)
def test_sixty_steps_end_on_the_bits_of_one_process(title: str, name: str, two_ranks: RankPool) -> None:
    if BY_TITLE[title].is_zero and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    (done, other) = two_ranks.run(soak, BY_TITLE[title], name, **SHORT)
    assert done == other
    kinds = ("freezings", "evaluations", "saves", "failures", "resumes")
    assert all(done[kind] > 1 for kind in kinds) and done["steps with repetitions"] > done["steps"]


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet: run `make soak` and commit what it writes")
def test_the_recorded_soak_is_what_would_be_measured() -> None:
    recorded: dict[str, Any] = json.loads(RESULTS.read_text())
    runs = recorded.pop("runs")
    assert recorded == expected(), "run `make soak` and commit what it writes"
    assert {title: run["optimizer"] for title, run in runs.items()} == RUNS
    counts = script(recorded["seed"], NUM_STEPS, recorded["ranks"]).counts()
    for run in runs.values():
        assert run["differing bits"] == 0 and run["steps with repetitions"] > NUM_STEPS
        assert {key: run[key] for key in counts} == counts


def soak_broken(engine: Engine) -> None:
    with mock.patch.object(run_state, "refuse_half_step", lambda optimizer, weights: None):
        soak(engine, "adamw_torch", **SHORT)


def test_control_a_half_step_that_can_be_saved_is_seen(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="CheckpointError was expected on all ranks"):
        two_ranks.run(soak_broken, BY_TITLE["DDP"])
