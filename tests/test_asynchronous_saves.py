"""Saves that are written beside the training: of the moment of the call, one at a time, and a failure told to all."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parity import build_subject, make_model, take_step
from patience import PATIENCE_S
from placements import full_parameters, place
from test_checkpoint import BREAK, BY_NAME
from torch import Tensor, nn

import dist_optim
from dist_optim.checkpoint import inspect, load_optimizer, run_state, save_optimizer, wait_for_saves
from dist_optim.checkpoint.blocks import Pieces
from dist_optim.checkpoint.directory import opened
from dist_optim.errors import BackgroundSaveError, CheckpointError, RanksDisagreeError
from dist_optim.ranks import background
from dist_optim.ranks.agreement import background_group, gather_objects
from dist_optim.testing import RankPool, assert_equal, faults

CASES = {case.name: case for case in BY_NAME}


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Saves are written no sooner than the function is called."""
    gate, write = threading.Event(), run_state.write_run

    def write_later(*args: Any) -> None:
        assert gate.wait(PATIENCE_S)
        write(*args)

    with mock.patch.object(run_state, "write_run", write_later):
        yield gate.set
    gate.set()


def differences_of_saves(name: str, placement: str, folder: Path) -> list[str]:
    """Between a save that is written several steps later, and one that was made at the same moment."""
    case = CASES[name]
    model = place(make_model(case), placement)
    optimizer = build_subject(case, model)
    for step in range(BREAK):
        take_step(case, model, optimizer, step)
    dist_optim.save_checkpoint(folder / "at once", model, optimizer, own={"step": BREAK})
    with held_back() as release:
        dist_optim.save_checkpoint(folder / "beside", model, optimizer, own={"step": BREAK}, asynchronous=True)
        for step in range(BREAK, case.steps):
            take_step(case, model, optimizer, step)
        assert not (folder / "beside").exists()
        release()
        wait_for_saves()
    first = inspect(folder / "at once", folder / "beside")
    assert first.problems == [] and first.steps == BREAK
    return [str(one) for one in first.differences]


@pytest.mark.parametrize(
    ("name", "placement"),
    [("galore_adamw", "ddp"), ("schedule_free_adamw", "fsdp1"), ("adamw_bnb_8bit", "fsdp2")],
)
def test_a_save_is_of_the_moment_of_the_call(name: str, placement: str, two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(differences_of_saves, name, placement, tmp_path) == [[], []]


def differences_without_a_copy(name: str, placement: str, folder: Path) -> list[str]:
    with mock.patch.object(Pieces, "copied", lambda self: self):
        return differences_of_saves(name, placement, folder)


def test_control_without_the_copy_it_is_of_a_later_one(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(differences_without_a_copy, "adamw_torch", "fsdp2", tmp_path):
        assert any("weight" in one for one in found), found


def bytes_copied(placement: str, folder: Path) -> tuple[int, int]:
    """By all ranks for one save, and bytes of the model and of its state."""
    case, copied, copy = CASES["adamw_torch"], 0, Pieces.copied

    def counting(self: Pieces) -> Pieces:
        nonlocal copied
        made = copy(self)
        copied += sum(block.untyped_storage().nbytes() for block in made.blocks.values())
        return made

    model = place(make_model(case), placement)
    optimizer = build_subject(case, model)
    take_step(case, model, optimizer, 0)
    with mock.patch.object(Pieces, "copied", counting):
        dist_optim.save_checkpoint(folder / "run", model, optimizer, asynchronous=True)
        wait_for_saves()
    weights = sum(one.nbytes for one in full_parameters(model).values())
    state = sum(gather_objects(optimizer.optimizer_state_bytes()))
    return sum(gather_objects(copied)), weights + state


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
def test_each_byte_is_copied_by_one_rank(placement: str, two_ranks: RankPool, tmp_path: Path) -> None:
    for copied, held in two_ranks.run(bytes_copied, placement, tmp_path):
        assert copied == held


def differences_under_zero(stage: int, folder: Path) -> list[str]:
    import zero

    run = zero.ZeroRun("galore_adamw", {"lr": 1e-3, "rank": 2, "target_modules": "all-linear"}, stage)
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(2))
    dist_optim.save_checkpoint(folder / "at once", engine, engine.optimizer)
    with held_back() as release:
        dist_optim.save_checkpoint(folder / "beside", engine, engine.optimizer, asynchronous=True)
        zero.train_engine(engine, run, range(2, 4))
        release()
        wait_for_saves()
    found = inspect(folder / "at once", folder / "beside")
    assert found.problems == [] and found.steps == 2
    with mock.patch.object(run_state, "write_run", full_disk):
        dist_optim.save_checkpoint(folder / "beside", engine, engine.optimizer, asynchronous=True)
        background.wait_here()
    (part,) = zero.parts_of(run, 4)
    engine.backward(zero.loss_of(engine, part, 4))
    with pytest.raises(BackgroundSaveError, match="No space left"):
        engine.step()
    engine.step()
    zero.train_engine(engine, run, range(5, 6))
    straight = zero.engine_of(run)
    zero.train_engine(straight, run, range(6))
    weights = zip(zero.weights_of(engine, run), zero.weights_of(straight, run), strict=True)
    return [str(one) for one in found.differences] + [
        f"{at}" for at, pair in enumerate(weights) if not pair[0].equal(pair[1])
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero_too(stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(differences_under_zero, stage, tmp_path) == [[], []]


# Failures -----------------------------------------------------------------------------------------------------------


class Training:
    """A small run under DDP."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.placed = place(self.model, "ddp") if dist.is_initialized() else self.model
        self.optimizer = dist_optim.build_optimizer(self.placed, "adamw_torch", lr=0.1, print_audit=False)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self.model.named_parameters()}

    def save(self, folder: Path, **options: Any) -> None:
        dist_optim.save_checkpoint(folder, self.placed, self.optimizer, asynchronous=True, **options)


def full_disk(*_: Any) -> dict[str, str]:
    raise OSError("No space left on device")


def failing_on_rank_1(training: Training, folder: Path) -> None:
    """A save that has failed on rank 1; whether rank 0's thread knows it yet, nobody can tell."""
    disk = mock.patch("dist_optim.checkpoint.run_content._write_files", full_disk)
    with disk if dist.get_rank() == 1 else mock.MagicMock():
        training.save(folder)
        if dist.get_rank() == 1:
            background.wait_here()


def failures_are_told_once_and_together(folder: Path) -> None:
    training = Training()
    training.step()
    training.save(folder / "run")
    wait_for_saves()

    def told(call: Callable[[], object]) -> None:
        failing_on_rank_1(training, folder / "run")
        weights = training.weights()
        with pytest.raises(BackgroundSaveError, match=r"beside the training.*No space left.*save again"):
            call()
        assert_equal(training.weights(), weights)
        background.wait_here()
        assert background.untold() is None

    told(training.step)
    assert training.optimizer.num_steps == 1
    training.step()  # goes on
    told(wait_for_saves)
    wait_for_saves()
    told(lambda: training.save(folder / "run"))
    told(lambda: save_optimizer(folder / "other", training.optimizer))
    told(lambda: dist_optim.load_checkpoint(folder / "run", training.placed, training.optimizer))
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["run"], "leftovers"
    assert inspect(folder / "run").steps == 1, "the one before"
    dist_optim.load_checkpoint(folder / "run", training.placed, training.optimizer)


def test_a_failure_is_told_once_to_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(failures_are_told_once_and_together, tmp_path)


def test_what_steps_inside_backward_is_told_in_step_and_goes_on(tmp_path: Path) -> None:
    def run(fails: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, fused_backward=True, print_audit=False)
        for step in range(3):
            if fails and step == 1:
                with mock.patch.object(run_state, "write_run", full_disk):
                    dist_optim.save_checkpoint(tmp_path / "run", model, optimizer, asynchronous=True)
                    background.wait_here()
            model(torch.ones(2, 4)).square().sum().backward()
            if fails and step == 1:
                with pytest.raises(BackgroundSaveError):
                    optimizer.step()
            optimizer.step()
        return [one.detach() for one in model.parameters()]

    assert all(one.equal(other) for one, other in zip(run(fails=True), run(fails=False), strict=True))


def refusals(folder: Path) -> None:
    training = Training()
    with pytest.raises(CheckpointError, match="Rehearse the first save alone"):
        training.save(folder, rehearse=True)
    with pytest.raises(RanksDisagreeError, match="asynchronous is False on rank 0 and True on rank 1"):
        dist_optim.save_checkpoint(folder, training.placed, training.optimizer, asynchronous=dist.get_rank() == 1)
    with pytest.raises(CheckpointError, match="plain"):
        training.save(folder, own=Path("object"))  # what can be known at the call is
    copy = mock.patch.object(Pieces, "copied", side_effect=RuntimeError("can't allocate memory"))
    with copy if dist.get_rank() else mock.MagicMock(), pytest.raises(CheckpointError, match="asynchronous=False"):
        training.save(folder)
    assert not folder.exists() and background.untold() is None
    group = background_group()
    assert group is background_group() and group is not dist.group.WORLD
    timeouts = [one._get_backend(torch.device("cpu")).options._timeout for one in (group, dist.group.WORLD) if one]
    assert timeouts[0] == timeouts[1]


def test_what_cannot_be_is_refused_at_the_call(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(refusals, tmp_path / "run")


# One at a time, and to the end ---------------------------------------------------------------------------------------


def test_one_save_waits_for_the_other(tmp_path: Path) -> None:
    training, running, most = Training(), 0, 0
    write = run_state.write_run

    def counting(*args: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.05)
        write(*args)
        running -= 1

    with mock.patch.object(run_state, "write_run", counting):
        for number in range(3):
            training.step()
            training.save(tmp_path / "run")
            assert not number or inspect(tmp_path / "run").steps == number
        save_optimizer(tmp_path / "optimizer", training.optimizer)
        assert inspect(tmp_path / "run").steps == 3 and most == 1
    save_optimizer(tmp_path / "optimizer", training.optimizer, asynchronous=True)
    training.step()
    load_optimizer(tmp_path / "optimizer", training.optimizer)
    assert training.optimizer.num_steps == 3


def end_with_a_save_under_way(folder: Path, fails: bool) -> None:
    training, write = Training(), run_state.write_run

    def slowly(*args: Any) -> None:
        threading.Event().wait(0.5)
        full_disk() if fails else write(*args)

    mock.patch.object(run_state, "write_run", slowly).start()
    training.save(folder)
    if not fails:  # neither ends before it: the process, and what it communicates by
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, backend="gloo")
        dist.destroy_process_group()
        assert folder.exists()
        training.step()
        training.save(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_ends_after_its_save(fails: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=end_with_a_save_under_way, args=(tmp_path / "run", fails)
    )
    child.start()
    child.join(60)
    assert child.exitcode == int(fails)
    if fails:
        assert "No space left on device" in capfd.readouterr().err and not (tmp_path / "run").exists()
    else:
        found = inspect(tmp_path / "run")
        assert found.is_sound and found.steps == 1


ENDS = """
import sys, torch, dist_optim, atexit
from dist_optim.checkpoint import run_state
def full_disk(*args):
    raise OSError(28, "No space left on device")
if "fails" in sys.argv:
    run_state.write_run = full_disk
model = torch.nn.Linear(4, 4)
optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, print_audit=False)
atexit.register(print, "others' hooks run")
dist_optim.save_checkpoint(sys.argv[1], model, optimizer, asynchronous=True)
if "asks" in sys.argv:
    try:
        dist_optim.checkpoint.wait_for_saves()
    except dist_optim.errors.BackgroundSaveError:
        pass
print("done")
"""


@pytest.mark.parametrize(("how", "code"), [([], 0), (["fails"], 1), (["fails", "asks"], 0)])
def test_a_program_whose_last_save_failed_has_failed(how: list[str], code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path / "run"), *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (code, ["done", "others' hooks run"])
    assert ("No space left on device" in done.stderr) == bool(code)


def test_a_kill_while_it_is_written_leaves_the_one_before_or_itself(tmp_path: Path) -> None:
    folder, training = tmp_path / "runs" / "run", Training()
    training.step()
    training.save(folder)
    wait_for_saves()
    training.step()
    with faults.faults_below(folder.parent, None, lambda: None) as calls:
        training.save(tmp_path / "runs" / "counted")
        wait_for_saves()
    found = []
    for number in range(0, calls.count, calls.count // 5):
        child = os.fork()
        if child == 0:
            with faults.faults_below(folder.parent, number, faults.kill):
                training.save(folder)
                training.step()  # goes on meanwhile
                wait_for_saves()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        inspection = inspect(opened(folder))
        assert inspection.is_sound, inspection.problems
        found.append(inspection.steps)
    assert set(found) <= {1, 2} and 1 in found, found
