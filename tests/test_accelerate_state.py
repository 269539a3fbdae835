"""``accelerator.save_state`` and ``load_state`` after ``prepare``: the resumed run is the run that went on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerated import Training, started_by_accelerate
from placements import full_parameters, own_group
from resuming import gap_after_resume, prepared_for, train_steps
from test_accelerate_deepspeed import accelerator_of
from zero import ZeroRun

from dist_optim.checkpoint import wait_for_saves
from dist_optim.checkpoint.blocks import Pieces, read_pieces
from dist_optim.checkpoint.engine_view import view_of
from dist_optim.checkpoint.index import stored_tensors
from dist_optim.errors import CheckpointError, StateDictError
from dist_optim.integrations.accelerate import state
from dist_optim.integrations.accelerate.state import _foreign_weights
from dist_optim.testing import RankFailure, RankPool, assert_equal

GALORE = {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3, "scale": 0.25}
RUNS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"lr": 1e-2},
    "galore_adamw": GALORE,
    "schedule_free_adamw": {"lr": 1e-2},
    "grokadamw": {"lr": 1e-2},
    "adafactor": {"lr": 1e-2},
}
SHARDS = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


def resume(name: str, strategy: str, directory: Path) -> None:
    assert gap_after_resume(Training(name, RUNS[name]), strategy, directory) == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    name: str, strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resume, name, strategy, tmp_path / "state")


@contextmanager
def prepared_under(strategy: str, name: str) -> Iterator[tuple[Any, ...]]:
    """Accelerator, model, optimizer, schedule; ``zero2`` and ``zero3`` are of DeepSpeed."""
    training = Training(name, RUNS[name], settings=SHARDS if strategy == "fsdp2 shards" else {})
    if strategy.startswith("zero"):
        run = ZeroRun(name, RUNS[name], int(strategy[4]), real_batches=True)
        with accelerator_of(run) as accelerator:
            yield accelerator, *prepared_for(accelerator, training)
        return
    with started_by_accelerate(strategy.split()[0], training) as accelerator:
        yield accelerator, *prepared_for(accelerator, training)


def everything_in(folder: Path) -> dict[str, torch.Tensor]:
    """State of the optimizer, and what it holds beside."""
    found = stored_tensors(folder / "dist_optim" / "tensors")
    pieces = {name: Pieces.whole(torch.empty(one.shape, dtype=one.dtype)) for name, one in found.items()}
    read_pieces(folder / "dist_optim" / "tensors", pieces, own_group())
    return {name: next(iter(piece.blocks.values())) for name, piece in pieces.items()}


def saves_for_others(name: str, strategy: str, folder: Path) -> dict[str, torch.Tensor]:
    with prepared_under(strategy, name) as (accelerator, model, optimizer, scheduler):
        train_steps(accelerator, model, optimizer, scheduler, range(3))
        accelerator.save_state(str(folder))
        return weights_of(optimizer)


def saves_what_it_loaded(name: str, strategy: str, folder: Path, again: Path) -> dict[str, torch.Tensor]:
    with prepared_under(strategy, name) as (accelerator, model, optimizer, scheduler):
        train_steps(accelerator, model, optimizer, scheduler, range(10, 12))
        accelerator.load_state(str(folder))
        accelerator.save_state(str(again))
        before, after = everything_in(folder), everything_in(again)
        assert_equal(after, before)
        assert scheduler.scheduler.last_epoch == 3, "one step each"
        return weights_of(optimizer)


def weights_of(optimizer: Any) -> dict[str, torch.Tensor]:
    """What is trained, whole."""
    view = view_of(optimizer)
    view.look()
    own = [(one.fqn, one.shape, one.layout, one.local().detach().clone()) for one in view.training_weights()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    whole = {fqn: torch.zeros(shape) for fqn, shape, _, _ in own}
    for rank, parts in enumerate(everyone):
        for fqn, _, layout, local in parts:
            layout.view_of(whole[fqn], rank).copy_(local)
    return whole


EVERY = ["ddp", "fsdp1", "fsdp2", "fsdp2 shards", "zero2", "zero3"]


@pytest.mark.parametrize("saving", EVERY)
def test_what_one_strategy_saves_every_other_loads(saving: str, two_ranks: RankPool, tmp_path: Path) -> None:
    name = "galore_adamw"
    saved = two_ranks.run(saves_for_others, name, saving, tmp_path / "state")[0]
    at = EVERY.index(saving)
    for loading in (EVERY[(at + 1) % 6], EVERY[(at + 2) % 6], EVERY[(at + 4) % 6]):
        loaded = two_ranks.run(saves_what_it_loaded, name, loading, tmp_path / "state", tmp_path / loading)[0]
        assert_equal(loaded, saved)


def resume_by_accelerate_alone(name: str, strategy: str, directory: Path) -> None:
    with mock.patch("dist_optim.integrations.accelerate.placing.serve_state"):
        resume(name, strategy, directory)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_accelerates_own_way_through_torchs_doors_keeps_the_state(
    strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resume_by_accelerate_alone, "galore_adamw", strategy, tmp_path / "state")


def resume_without_state(directory: Path) -> None:
    with mock.patch("dist_optim.integrations.accelerate.state.install"):
        resume("galore_adamw", "ddp", directory)


def test_control_a_run_without_its_state_ends_elsewhere(two_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        two_ranks.run(resume_without_state, tmp_path / "state")


def another_rate(directory: Path) -> tuple[list[float], list[float]]:
    """The rates of the steps after a load: of a run that goes on with twice the rate, and of one that always had it."""
    slow, fast = (Training("adamw_torch", {"lr": rate}) for rate in (1e-2, 2e-2))
    rates: dict[str, list[float]] = {}
    with started_by_accelerate("ddp", slow) as accelerator:
        model, optimizer, scheduler = prepared_for(accelerator, slow)
        train_steps(accelerator, model, optimizer, scheduler, range(2))
        accelerator.save_state(str(directory))
    for label in ("resumed", "always"):
        rates[label] = []
        with started_by_accelerate("ddp", fast) as accelerator:
            model, optimizer, scheduler = prepared_for(accelerator, fast)
            if label == "always":
                train_steps(accelerator, model, optimizer, scheduler, range(2))
            else:
                with pytest.raises(StateDictError, match=r"lr of group 0 is 0.01 in it and 0.02 here"):
                    accelerator.load_state(str(directory))
                accelerator.load_state(str(directory), allow_changed=["lr"])
            for step in range(2, 5):
                train_steps(accelerator, model, optimizer, scheduler, range(step, step + 1))
                rates[label].append(optimizer.param_groups[0]["lr"])
    return rates["resumed"], rates["always"]


def test_another_rate_that_is_allowed_is_gone_on_with(one_rank: RankPool, tmp_path: Path) -> None:
    ((resumed, always),) = one_rank.run(another_rate, tmp_path / "state")
    assert resumed == pytest.approx(always) and len(set(always)) == 3


class Killed(BaseException):
    pass


def no_mixture_of_two_states(directory: Path) -> None:
    training = Training("galore_adamw", GALORE)
    with started_by_accelerate("ddp", training) as accelerator:
        model, optimizer, scheduler = prepared_for(accelerator, training)
        train_steps(accelerator, model, optimizer, scheduler, range(1))
        accelerator.save_state(str(directory))
        train_steps(accelerator, model, optimizer, scheduler, range(1, 3))
        ours = "dist_optim.integrations.accelerate.state.save_optimizer"
        with mock.patch(ours, side_effect=Killed), pytest.raises(Killed):
            accelerator.save_state(str(directory))
        train_steps(accelerator, model, optimizer, scheduler, range(3, 4))
        before = {name: full.clone() for name, full in full_parameters(model).items()}
        with pytest.raises(CheckpointError, match=r"has no optimizer\.json"):
            accelerator.load_state(str(directory))
        assert_equal(full_parameters(model), before)
        writes = "accelerate.accelerator.save_accelerator_state"
        for rank in (0, 1):
            error = OSError("read-only file system") if dist.get_rank() == rank else None
            with mock.patch(writes, side_effect=error), pytest.raises(CheckpointError, match="read-only file system"):
                accelerator.save_state(str(directory))


def test_a_job_killed_or_failing_in_save_state_leaves_no_mixture(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(no_mixture_of_two_states, tmp_path / "state")


def test_weights_of_several_models_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "dist_optim_weights").mkdir()
    two: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), _models=[object(), object()])
    with pytest.raises(CheckpointError, match="2 models"):
        _foreign_weights(two, tmp_path)


# accelerate's own numbers -----------------------------------------------------------------------------------------


ADAMW = Training("adamw_torch", {"lr": 1e-2})


def states_left(folder: Path, asynchronous: bool) -> list[list[str]]:
    """With a limit of one: after a save, after one that failed, and after the next."""
    found = []
    with started_by_accelerate("ddp", ADAMW) as accelerator:
        project = accelerator.project_configuration
        project.set_directories(str(folder))
        project.automatic_checkpoint_naming, project.total_limit = True, 1
        model, optimizer, scheduler = prepared_for(accelerator, ADAMW)
        for step in range(3):
            train_steps(accelerator, model, optimizer, scheduler, range(step, step + 1))
            failing = mock.patch.object(state, "seal_folder", side_effect=CheckpointError("the disk is full. Empty it"))
            try:
                with failing if step == 1 else nullcontext():
                    accelerator.save_state(asynchronous=asynchronous)
                    wait_for_saves()
            except CheckpointError:
                assert step == 1
            dist.barrier()
            found.append(sorted(path.name for path in (folder / "checkpoints").iterdir()))
            dist.barrier()
            assert project.total_limit == 1
    return found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_limit_removes_no_state_before_the_next_one_is_whole(
    asynchronous: bool, two_ranks: RankPool, tmp_path: Path
) -> None:
    for found in two_ranks.run(states_left, tmp_path, asynchronous):
        assert found == [["checkpoint_0"], ["checkpoint_0"], ["checkpoint_2"]]


@contextmanager
def as_accelerate_has_it(accelerator: Any) -> Iterator[None]:
    yield


def left_by_accelerates_own_way(folder: Path) -> list[list[str]]:
    with mock.patch.object(state, "nothing_removed", as_accelerate_has_it):
        return states_left(folder, False)


def test_control_accelerates_own_way_is_left_with_none(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(left_by_accelerates_own_way, tmp_path)[0][1] == []
