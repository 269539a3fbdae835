"""Checkpoints at the edges: around an evaluation, onto a used optimizer, damaged, and with a rank that fails alone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import full_parameters, place
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import dist_optim
from dist_optim.checkpoint import load_optimizer
from dist_optim.checkpoint.directory import recover, written_aside
from dist_optim.checkpoint.index import stored_tensors
from dist_optim.errors import CheckpointError, DistOptimError, StateDictError
from dist_optim.ranks.agreement import own_rank
from dist_optim.testing import RankFailure, RankPool, assert_equal, assert_no_problems_on_any_rank

# Around an evaluation ---------------------------------------------------------------------------------------------


def mixed_precision_run(seed: int) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model[0], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, print_audit=False)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.ones(3, 4))  # leaves the root unit gathered, in bf16


def evaluations_change_no_checkpoint(directory: Path) -> None:
    model, optimizer = mixed_precision_run(0)
    expected = {name: full.clone() for name, full in full_parameters(model).items()}
    evaluate(model)
    dist_optim.save_checkpoint(directory, model, optimizer)
    stored = {one.dtype for one in stored_tensors(directory / "model").values()}
    other, resumed = mixed_precision_run(1)
    evaluate(other)
    dist_optim.load_checkpoint(directory, other, resumed)
    problems = [] if stored == {torch.float32} else [f"the folder holds {stored}"]
    problems += [name for name, full in full_parameters(other).items() if not torch.equal(full, expected[name])]
    assert_no_problems_on_any_rank(problems)


def test_an_evaluation_before_saving_or_loading_changes_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(evaluations_change_no_checkpoint, tmp_path / "run")


def evaluations_with_gathered_parameters(directory: Path) -> None:
    with mock.patch("dist_optim.layouts.detect.reshard"):
        evaluations_change_no_checkpoint(directory)


def test_control_what_an_evaluation_leaves_is_not_what_is_trained(two_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        two_ranks.run(evaluations_with_gathered_parameters, tmp_path / "run")


# Onto a used optimizer --------------------------------------------------------------------------------------------


def take_steps(model: nn.Module, optimizer: dist_optim.DistributedOptimizer, num_steps: int, without: str = "") -> None:
    for _ in range(num_steps):
        for name, parameter in model.named_parameters():
            parameter.grad = None if without and without in name else torch.ones_like(parameter)
        optimizer.step()


def a_load_replaces_all_state(folder: Path) -> None:
    problems = []
    for name in ("adamw_torch", "grokadamw", "schedule_free_adamw"):
        for without in ("", "1.weight"):
            model = place(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "ddp")
            optimizer = dist_optim.build_optimizer(model, name, lr=0.1, print_audit=False)
            take_steps(model, optimizer, 1 if without else 0, without)
            expected = set(optimizer.state_dict()["state"])
            directory = folder / f"{name}-{without}"
            dist_optim.save_checkpoint(directory, model, optimizer)
            take_steps(model, optimizer, 3)
            dist_optim.load_checkpoint(directory, model, optimizer)
            found = set(optimizer.state_dict()["state"])
            if found != expected or optimizer.num_steps != (1 if without else 0):
                problems.append(f"{name}, without {without!r}: state of {found - expected} is left")
    assert_no_problems_on_any_rank(problems)


def test_a_load_onto_a_used_optimizer_replaces_all_state(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(a_load_replaces_all_state, tmp_path)


# Damage: refused on all ranks, and nothing is changed --------------------------------------------------------------


class Payload:
    """Runs as soon as it is unpickled by a plain unpickler."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Subject:
    """A run in training, and all of its bits."""

    def __init__(self, name: str = "adamw_torch", dtype: torch.dtype = torch.float32) -> None:
        self.model = place(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype), "ddp")
        self.optimizer = dist_optim.build_optimizer(self.model, name, lr=0.1, print_audit=False)
        self.schedule: Any = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        take_steps(self.model, self.optimizer, 2)
        self.schedule.step()

    def bits(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"].values()
        tensors = [*self.model.parameters(), *(torch.as_tensor(one) for values in state for one in values.values())]
        rates = [torch.tensor(float(group["lr"])) for group in self.optimizer.param_groups]
        return [tensor.detach().clone() for tensor in [*tensors, *rates, torch.tensor(self.schedule.last_epoch)]]

    def load(self, directory: Path) -> None:
        dist_optim.load_checkpoint(directory, self.model, self.optimizer, self.schedule)


def flip(path: Path, find: bytes) -> None:
    """Damage the first byte of what is found; of the values, where that is the name of a tensor in its archive."""
    content = bytearray(path.read_bytes())
    at = content.index(find)
    if find == TENSOR:
        name_length, extra_length = (int.from_bytes(content[at - n : at - n + 2], "little") for n in (4, 2))
        at += name_length + extra_length
    content[at] ^= 0xFF
    path.write_bytes(content)


def edit(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


TENSOR = b"archive/data/0"


def first_tensors(directory: Path) -> Path:
    return min(directory.glob("*.distcp"))


def put_payload(folder: Path, where: str) -> None:
    (folder / where / ".metadata").write_bytes(pickle.dumps(Payload(folder.parent / "executed")))


def lead_outside(folder: Path) -> None:
    """The index names a file elsewhere."""
    path = folder / "model" / ".metadata"
    index = pickle.loads(path.read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../optimizer/tensors/{info.relative_path}"
    path.write_bytes(pickle.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a code in the model's index": (partial(put_payload, where="model"), "index of"),
    "a code in the optimizer's index": (partial(put_payload, where="optimizer/tensors"), "index of"),
    "a path in the index": (lead_outside, "no file of the folder"),
    "a byte of the weights": (lambda folder: flip(first_tensors(folder / "model"), TENSOR), "damaged"),
    "a byte of the state": (lambda folder: flip(first_tensors(folder / "optimizer" / "tensors"), TENSOR), "damaged"),
    "a file of the state": (lambda folder: first_tensors(folder / "optimizer" / "tensors").unlink(), "missing"),
    "the record": (lambda folder: (folder / "optimizer" / "optimizer.json").unlink(), "No such file"),
    "a record without groups": (
        lambda folder: edit(folder / "optimizer" / "optimizer.json", "param_groups", 3),
        "not the file that was saved with checkpoint.json",
    ),
    "a byte of a rank's own": (lambda folder: flip(folder / "ranks" / "0.pt", b"step"), "is not the file"),
    "a rank's own": (lambda folder: (folder / "ranks" / "1.pt").unlink(), "cannot be read"),
    "the schedule": (lambda folder: (folder / "scheduler.pt").unlink(), "No such file"),
    "a schedule that is none": (
        lambda folder: torch.save([1], folder / "scheduler.pt"),
        "is not the file",
    ),
}


def refused(action: Callable[[], object], kind: type[DistOptimError], words: str) -> str:
    """What is wrong with how this rank refused; empty where nothing is."""
    try:
        action()
    except DistOptimError as error:
        return "" if isinstance(error, kind) and words in str(error) else f"refused by {type(error).__name__}: {error}"
    return "not refused"


def nothing_is_changed_by(subject: Subject, directory: Path, kind: type[DistOptimError], words: str) -> list[str]:
    before = subject.bits()
    problem = refused(lambda: subject.load(directory), kind, words)
    after = subject.bits()
    is_changed = len(before) != len(after) or any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    return [*([problem] if problem else []), *(["something has been changed"] if is_changed else [])]


def refused_loads_change_nothing(folder: Path) -> None:
    saved, problems = Subject(), []
    dist_optim.save_checkpoint(folder / "run", saved.model, saved.optimizer, saved.schedule, own={"step": 1})
    subject = Subject()
    subject.schedule.step()
    for what, (damage, words) in DAMAGE.items():
        damaged = folder / "damaged"
        if dist.get_rank() == 0:
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(folder / "run", damaged)
            damage(damaged)
        dist.barrier()
        problems += [f"{what}: {one}" for one in nothing_is_changed_by(subject, damaged, CheckpointError, words)]
        dist.barrier()
    if (folder / "executed").exists():
        problems.append("code in an index was run")
    others = {"in bf16": Subject(dtype=torch.bfloat16), "is of 'adamw_torch'": Subject("sgd")}
    for words, other in others.items():
        kind = CheckpointError if "bf16" in words else StateDictError
        found = nothing_is_changed_by(other, folder / "run", kind, "" if "bf16" in words else words)
        problems += [f"{words}: {one}" for one in found]
    subject.schedule.load_state_dict = raises_on(1, ValueError("not mine"), subject.schedule.load_state_dict)
    problems += nothing_is_changed_by(subject, folder / "run", CheckpointError, "not mine")
    del subject.schedule.load_state_dict
    subject.load(folder / "run")  # the control: the whole one loads
    assert_equal(dict(enumerate(subject.bits())), dict(enumerate(saved.bits())))
    assert_no_problems_on_any_rank(problems)


def raises_on(rank: int, error: Exception, action: Callable[..., Any] = lambda *values, **named: None) -> Any:
    """``action``, but on this rank it fails."""

    def act(*values: Any, **named: Any) -> Any:
        if own_rank() == rank:
            raise error
        return action(*values, **named)

    return act


def test_a_refused_load_changes_nothing_on_any_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(refused_loads_change_nothing, tmp_path)


def test_the_payload_runs_where_nothing_keeps_it_from_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


# A rank that fails alone while saving -------------------------------------------------------------------------------


class Unpicklable:
    def state_dict(self) -> dict[str, Any]:
        return {"function": lambda: None}


def failures_of(rank: int) -> dict[str, tuple[AbstractContextManager[Any], Any, Any, str]]:
    """What a save meets: something patched, the schedule, this rank's own, and the words of the refusal."""
    full = RuntimeError("PytorchStreamWriter failed writing file: no space left")
    is_hit = dist.get_rank() == rank
    writing = "torch.distributed.checkpoint.filesystem._write_item"
    return {
        "a full disk": (mock.patch("torch.save", raises_on(rank, full, torch.save)), None, None, "no space left"),
        "a rank that cannot write": (
            mock.patch(writing, raises_on(rank, OSError("read-only"))),
            None,
            None,
            "read-only",
        ),
        "a lambda of one rank": (nullcontext(), None, {"f": lambda: 1} if is_hit else {}, "plain values"),
        "an unpicklable schedule": (nullcontext(), Unpicklable(), None, "plain values"),
        "a schedule without a state": (nullcontext(), object(), None, "has no state_dict()"),
    }


def failed_saves_fail_everywhere_and_leave_nothing(folder: Path) -> None:
    subject, problems = Subject(), []
    dist_optim.save_checkpoint(folder / "run", subject.model, subject.optimizer, subject.schedule)
    before = sorted(path.name for path in folder.iterdir())
    for rank in (0, 1):
        for what, (patched, schedule, own, words) in failures_of(rank).items():
            with patched:
                action = partial(dist_optim.save_checkpoint, folder / "run", subject.model, subject.optimizer, schedule)
                problem = refused(lambda act=action, own=own: act(own=own), CheckpointError, words)  # type: ignore[misc]
            dist.barrier()
            left = sorted(path.name for path in folder.iterdir())
            dist.barrier()
            problems += [f"{what}: {problem}"] if problem else []
            problems += [f"{what}: left {left}"] if left != before else []
    elsewhere = folder / f"disk {dist.get_rank()}"
    elsewhere.mkdir()  # as two nodes have the same path on disks of their own
    problem = refused(
        lambda: dist_optim.save_checkpoint(elsewhere / "run", subject.model, subject.optimizer),
        CheckpointError,
        "do not share this disk",
    )
    problems += [problem, *(f"left {path}" for path in elsewhere.iterdir())]
    subject.load(folder / "run")
    assert_no_problems_on_any_rank([problem for problem in problems if problem])


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(failed_saves_fail_everywhere_and_leave_nothing, tmp_path)


def test_what_a_kill_leaves_between_two_names_is_recovered(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        with written_aside(tmp_path / name, None) as aside:
            (aside / "content").write_text(name)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.replaced")
    (tmp_path / ".checkpoint-2.partial" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / ".other.partial").mkdir()
    recover(tmp_path, "checkpoint-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial", "checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "content").read_text() == "checkpoint-2"


def test_checksums_are_there_to_be_compared_where_a_program_has_turned_them_off(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, momentum=0.9, print_audit=False)
    take_steps(model, optimizer, 1)
    torch.serialization.set_crc32_options(False)
    try:
        dist_optim.save_checkpoint(tmp_path / "run", model, optimizer)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    load_optimizer(tmp_path / "run" / "optimizer", optimizer)
