"""A rehearsed save: one that could not be resumed from is refused, nothing is left of it, and the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from strategies import BREAK, Values, gap, one_process, recipe_of, strategy
from trainers import Job, gap_between, train
from transformers import TrainerCallback

from dist_optim.checkpoint import blocks
from dist_optim.errors import CheckpointError
from dist_optim.integrations.transformers.first_save import RehearsedSave
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

write, fill = UpstreamInstance.write_encoded_state, blocks._block


def forget_a_moment(self: UpstreamInstance, index: int, encoded: Mapping[str, Any], **options: Any) -> None:
    write(self, index, {key: value for key, value in encoded.items() if key != "exp_avg"}, **options)


def write_sevens(self: blocks._WritePlanner, index: Any) -> torch.Tensor:
    return fill(self.state_dict, index).clone().fill_(7.0)


FAULTS: dict[str, Any] = {
    "state": mock.patch.object(UpstreamInstance, "write_encoded_state", forget_a_moment),
    "disk": mock.patch.object(blocks._WritePlanner, "lookup_object", write_sevens),
}


def refused_and_gone(text: str, fault: str, folder: Path) -> Values:
    recipe = recipe_of("galore_adamw")
    side = strategy(text).side(recipe)
    for at in range(BREAK):
        side.step(at)
    with FAULTS[fault], pytest.raises(CheckpointError, match="Nothing was saved"):
        side.save(folder)
    side.step(BREAK)  # the first rank has removed it by then
    assert not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))
    return side.weights()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("text", ["fsdp2:2", "zero2:2"])
def test_what_would_not_load_is_not_saved(text: str, fault: str, two_ranks: RankPool, tmp_path: Path) -> None:
    found = two_ranks.run(refused_and_gone, text, fault, tmp_path / "run")
    expected = two_ranks.run(one_process, recipe_of("galore_adamw"), BREAK + 1)[0][-1]
    assert gap(found, [expected] * 2) == 0


class StepsSeen(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
        self.steps = state.global_step


def ends_after_a_step(strategy: str, folder: Path) -> None:
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    seen, problems, job = StepsSeen(), [], Job("galore_adamw", saves)
    plain = train(job, strategy, folder / "plain")
    rehearsed = train(replace(job, options={"callbacks": [RehearsedSave()]}), strategy, folder / "run")
    if gap_between(plain, rehearsed):
        problems.append("a rehearsal changes the run")
    if (folder / "run" / ".rehearsal").exists():
        problems.append("a rehearsal is left")
    with FAULTS["state"], pytest.raises(CheckpointError, match="exp_avg"):
        train(replace(job, options={"callbacks": [seen, RehearsedSave()]}), strategy, folder / "failing")
    if seen.steps != 1:
        problems.append(f"it failed after {seen.steps} steps")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_trainer_rehearses_after_its_first_step(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(ends_after_a_step, strategy, tmp_path)
