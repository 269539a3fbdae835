"""A save that is killed, or whose disk fails, at each of its file-system calls: the one before, or itself, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_optim
from dist_optim.checkpoint import load_optimizer, save_optimizer
from dist_optim.errors import CheckpointError
from dist_optim.testing import faults

Bits = list[Tensor]


class Training:
    """A small run, deterministic from its start."""

    def __init__(self, steps: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        self.optimizer = dist_optim.build_optimizer(self.model, "adamw_torch", lr=0.1, print_audit=False)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.model(torch.ones(2, 5)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def bits(self) -> Bits:
        states = self.optimizer.state_dict()["state"].values()
        moments = [torch.as_tensor(value) for own in states for value in own.values()]
        return [one.detach().clone() for one in (*self.model.parameters(), *moments)]


def save_run(folder: Path, training: Training) -> None:
    dist_optim.save_checkpoint(folder, training.model, training.optimizer, training.schedule)


def load_run(folder: Path, training: Training) -> None:
    dist_optim.load_checkpoint(folder, training.model, training.optimizer, training.schedule)


def save_state_alone(folder: Path, training: Training) -> None:
    save_optimizer(folder, training.optimizer)


def load_state_alone(folder: Path, training: Training) -> None:
    load_optimizer(folder, training.optimizer)
    training.model.load_state_dict(Training(training.optimizer.num_steps).model.state_dict())


DOORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "save_checkpoint": (save_run, load_run),
    "save_optimizer": (save_state_alone, load_state_alone),
}


def resumed(door: str, folder: Path) -> Bits:
    training = Training(1)
    DOORS[door][1](folder, training)
    return training.bits()


def equal(one: Bits, other: Bits) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def changing_calls(door: str, folder: Path) -> int:
    with faults.faults_below(folder.parent, None, lambda: None) as calls:
        DOORS[door][0](folder, Training(3))
    return calls.count


@pytest.mark.parametrize("door", DOORS)
def test_a_kill_at_any_call_leaves_one_of_both(door: str, tmp_path: Path) -> None:
    folder, before, after = tmp_path / "runs" / "run", Training(2), Training(3)
    folder.parent.mkdir()
    DOORS[door][0](folder, before)
    count, ended_as = changing_calls(door, folder), set()
    assert count > 10
    for number in range(count):
        DOORS[door][0](folder, before)  # what the kill before has left is no obstacle
        assert [path.name for path in folder.parent.iterdir()] == ["run"], "leftovers grow"
        child = os.fork()
        if child == 0:
            try:
                with faults.faults_below(folder.parent, number, faults.kill):
                    DOORS[door][0](folder, after)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        is_before, is_after = (equal(resumed(door, folder), one.bits()) for one in (before, after))
        assert is_before or is_after, f"call {number}"
        ended_as.add(is_after)
    assert ended_as == {False, True}


@pytest.mark.parametrize("fault", [faults.disk_full, faults.read_only], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_a_disk_that_fails_at_any_call_leaves_the_save_before(
    door: str, fault: Callable[[], None], tmp_path: Path
) -> None:
    folder, before, after = tmp_path / "runs" / "run", Training(2), Training(3)
    folder.parent.mkdir()
    DOORS[door][0](folder, before)
    for number in range(changing_calls(door, folder)):
        DOORS[door][0](folder, before)
        try:
            with faults.faults_below(folder.parent, number, fault):
                DOORS[door][0](folder, after)
        except CheckpointError as error:
            assert "space" in str(error) or "Read-only" in str(error)
            expected = before
        else:
            expected = after  # only what was to be removed could not be
        assert equal(resumed(door, folder), expected.bits()), f"call {number}"
        if expected is before:
            assert [path.name for path in folder.parent.iterdir()] == ["run"], f"call {number} left something"


def test_control_a_save_in_place_is_seen(tmp_path: Path) -> None:
    """Records and tensors written where they are read: some kill leaves neither of both."""
    folder, before, after = tmp_path / "run", Training(2), Training(3)
    save_run(folder, before)
    whole = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                with faults.faults_below(folder, number, faults.kill):
                    for path in sorted(folder.rglob("*.json")):
                        path.write_text("{}")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        try:
            whole.append(any(equal(resumed("save_checkpoint", folder), one.bits()) for one in (before, after)))
        except CheckpointError:
            whole.append(False)
    assert not all(whole)
