"""Checkpoints that the Trainer and accelerate write while training goes on: of their moment, whole, or told of."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from door_runs import BesideAccelerate, ByAccelerateEach, equal
from fresh import own_libraries
from patience import PATIENCE_S
from test_trainer_resume import BEST_OF_TWO, IN_PIECES, SCHEDULED, SHARDS
from torch import nn
from trainers import Job, Outcome, gap_between, train
from transformers import TrainerCallback

from dist_optim.checkpoint import folder_seal, wait_for_saves
from dist_optim.checkpoint.blocks import Pieces
from dist_optim.checkpoint.folder_seal import MARK, differences_in
from dist_optim.errors import BackgroundSaveError, CheckpointError, UnsupportedError
from dist_optim.integrations.transformers import Trainer, beside_training
from dist_optim.integrations.transformers.history import checkpoints_in
from dist_optim.ranks import background
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

BESIDE = {**SCHEDULED, "asynchronous_saves": True}


class HeldBack(TrainerCallback):
    """A save of step 3 is written when step 5 has ended, and no sooner; when it was seen, and when it was told of."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gate = folder, threading.Event()
        self.seen: list[int] = []
        self.told: list[tuple[int, int, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += [state.global_step] if (self.folder / "checkpoint-3").exists() else []
        if state.global_step == 5:
            self.gate.set()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_whole = (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK).exists()
        self.told.append((state.global_step, state.log_history[-1]["step"], is_whole))

    @contextmanager
    def holding(self) -> Iterator[None]:
        def waiting(self: Any, directory: Path, ranks: Any) -> None:
            assert gate.wait(PATIENCE_S)
            write(self, directory, ranks)

        gate, write = self.gate, beside_training.DeferredWrites.write
        with mock.patch.object(beside_training.DeferredWrites, "write", waiting):
            yield


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2 shards": ("fsdp2", {"fsdp_config": SHARDS}),
    "zero3 pieces": ("zero3", {"deepspeed": IN_PIECES}),
}
"""Weights that are nowhere whole in a checkpoint."""


def trained(job: Job, strategy: str, folder: Path) -> Outcome:
    under, more = SETTINGS.get(strategy, (strategy, {}))
    reading: Any = mock.patch("trainers.load_file", lambda path: {}) if more else nullcontext()
    with reading:
        return train(job, under, folder, **more)


def saved_while_training_goes_on(name: str, strategy: str, folder: Path) -> HeldBack:
    held = HeldBack(folder)
    with held.holding():
        trained(Job(name, BESIDE, options={"callbacks": [held]}), strategy, folder)
    return held


def resumes_exactly(name: str, strategies: list[str], directory: Path) -> None:
    problems = []
    for strategy in strategies:
        home = directory / strategy
        whole = trained(Job(name, SCHEDULED), strategy, home / "at once")
        held = saved_while_training_goes_on(name, strategy, home / "beside")
        if held.seen not in ([], [6]):
            problems.append(f"{strategy}: it was there after {held.seen}")
        if held.told != [(3, 3, True), (6, 6, True)]:
            problems.append(f"{strategy}: told of {held.told}")
        at_once, beside = (home / kind / "checkpoint-3" for kind in ("at once", "beside"))
        job = Job(name, SCHEDULED)
        expected = trained(replace(job, resume=str(at_once)), strategy, home / "expected")
        resumed = trained(replace(job, resume=str(beside)), strategy, home / "resumed")
        problems += [f"{strategy}: {one}" for one in _differences(resumed, expected, beside)]
        problems += [f"{strategy}: {one}" for one in _differences(resumed, whole, beside)]
        problems += [f"{strategy}: left {path.name}" for path in (home / "beside").glob(".*")]
    assert_no_problems_on_any_rank(problems)


def _differences(one: Outcome, other: Outcome, folder: Path) -> list[str]:
    found = [problem for _, problem in differences_in(folder)]
    if one.weights and gap_between(one, other):
        found.append(f"{gap_between(one, other):.2e} apart")
    if one.all("loss")[-3:] != other.all("loss")[-3:]:
        found.append(f"losses {one.all('loss')} and {other.all('loss')}")
    return found


@pytest.mark.parametrize(
    ("name", "strategies"),
    [
        ("galore_adamw", ["ddp", "fsdp2 shards", "zero3 pieces"]),
        ("schedule_free_adamw", ["fsdp1", "zero2"]),
        ("adamw_torch", ["fsdp2", "zero3"]),
    ],
)
def test_it_is_of_its_moment_and_resumes_to_the_bit(
    name: str, strategies: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resumes_exactly, name, strategies, tmp_path)


def gap_without(what: str, folder: Path) -> float:
    job = Job("adamw_torch", SCHEDULED)
    whole = trained(job, "ddp", folder / "whole")
    copies: dict[str, Any] = {
        "a copy of the state": mock.patch.object(Pieces, "copied", lambda self: self),
        "a copy of the weights": mock.patch.object(beside_training, "on_host", dict),
    }
    with copies[what]:
        saved_while_training_goes_on("adamw_torch", "ddp", folder / "beside")
    resumed = replace(job, resume=str(folder / "beside" / "checkpoint-3"))
    try:
        return gap_between(whole, trained(resumed, "ddp", folder / "resumed"))
    except CheckpointError as error:
        assert "is damaged" in str(error), "a step has changed what was just being written"
        return float("inf")


@pytest.mark.parametrize("what", ["a copy of the state", "a copy of the weights"])
def test_control_without_a_copy_it_is_of_no_moment(what: str, two_ranks: RankPool, tmp_path: Path) -> None:
    assert min(two_ranks.run(gap_without, what, tmp_path)) > 1e-4


# Failures -----------------------------------------------------------------------------------------------------------


def fails_on_rank_1_in_the_second(original: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(100))

    def act(*positional: Any, **named: Any) -> Any:
        if next(calls) == 1 and dist.get_rank() == 1:
            raise OSError("No space left on device")
        return original(*positional, **named)

    return act


def failure_is_told_and_leaves_the_one_before(directory: Path) -> None:
    job, folder = Job("galore_adamw", {**BESIDE, "save_steps": 2}), directory / "run"
    whole = trained(Job("galore_adamw", SCHEDULED), "ddp", directory / "whole")
    seals = fails_on_rank_1_in_the_second(folder_seal._sums)
    steps: list[int] = []

    class Counts(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            background.wait_here()  # so that the step finds it

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    failing = replace(job, options={"callbacks": [Counts()]})
    with mock.patch.object(folder_seal, "_sums", seals), pytest.raises(BackgroundSaveError, match="No space left"):
        trained(failing, "ddp", folder)
    dist.barrier()
    assert steps == [1, 2, 3, 4], "told at the next step, which is not made"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert gap_between(whole, trained(replace(job, resume=True), "ddp", folder)) == 0
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_failure_is_told_at_the_next_step_and_the_run_resumes(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(failure_is_told_and_leaves_the_one_before, tmp_path)


def fails_in_the_last_save(folder: Path) -> None:
    job = Job("adamw_torch", {**BESIDE, "max_steps": 3})
    full = mock.patch.object(folder_seal, "_sums", side_effect=OSError("No space left on device"))
    with full, pytest.raises(BackgroundSaveError, match="No space left"):
        trained(job, "ddp", folder)
    assert list(folder.iterdir()) == []


def test_the_last_save_is_waited_for(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(fails_in_the_last_save, tmp_path)


def best_and_limit(folder: Path) -> None:
    run = trained(Job("adamw_torch", {**BESIDE, **BEST_OF_TWO}), "ddp", folder)
    losses = run.all("eval_loss")
    best = losses.index(min(losses)) + 1
    kept = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert len(kept) == 2 and kept == sorted({best, 6} | ({5} if best == 6 else set())), (losses, kept)
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{best}")


def test_the_best_one_and_the_limit_are_as_with_other_saves(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(best_and_limit, tmp_path)


def refusals(folder: Path) -> None:
    for settings, name, words in [
        ({"push_to_hub": True}, "adamw_torch", "uploads a checkpoint"),
        ({"enable_jit_checkpoint": True}, "adamw_torch", "has a moment left"),
    ]:
        with pytest.raises(UnsupportedError, match=words), mock.patch("transformers.Trainer.init_hf_repo"):
            trained(Job(name, {**BESIDE, **settings}), "ddp", folder)


def test_what_cannot_wait_is_refused_before_the_first_step(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(refusals, tmp_path)


class StockOptimizer(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


def test_another_optimizers_state_is_not_ours_to_copy(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not dist_optim's"):
        trained(Job("adamw_torch", BESIDE, kind=StockOptimizer), "alone", tmp_path)


# accelerate ---------------------------------------------------------------------------------------------------------


def test_accelerates_state_loads_when_it_is_sealed_and_no_sooner(tmp_path: Path) -> None:
    with own_libraries():
        run = BesideAccelerate(tmp_path, 2)
        gate, written, seal = threading.Event(), threading.Event(), folder_seal.seal_folder

        def later(*args: Any) -> None:
            written.set()
            assert gate.wait(PATIENCE_S)
            seal(*args)

        with mock.patch("dist_optim.integrations.accelerate.state.seal_folder", later):
            folder = Path(run.accelerator.save_state(str(tmp_path / "state"), asynchronous=True))
            before = run.bits()
            run.optimizer.zero_grad()
            run.optimizer.step()
            assert written.wait(PATIENCE_S) and not (folder / MARK).exists()
            with pytest.raises(CheckpointError, match="is not known"):
                folder_seal.check_folder(folder)
            gate.set()
            wait_for_saves()
        fresh = ByAccelerateEach(tmp_path, 0)
        fresh.load(folder)
        assert equal(fresh.bits(), before) and not list(differences_in(folder))
        with mock.patch.object(folder_seal, "_sums", side_effect=OSError("No space left on device")):
            run.accelerator.save_state(str(tmp_path / "second"), asynchronous=True)
            background.wait_here()
        with pytest.raises(BackgroundSaveError, match="No space left"):
            run.accelerator.save_state(str(tmp_path / "third"))
        assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()
        run.accelerator.save_state(str(tmp_path / "third"))


def test_accelerate_alone_writes_nothing_beside(tmp_path: Path) -> None:
    with own_libraries():
        run = ByAccelerateEach(tmp_path, 1)
        run.accelerator._optimizers[:] = []
        with pytest.raises(CheckpointError, match="no optimizer of dist_optim"):
            run.accelerator.save_state(str(tmp_path / "state"), asynchronous=True)
    assert not (tmp_path / "state").exists()
