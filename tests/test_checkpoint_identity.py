"""One save is one; hyperparameters of the build are compared; and no other package's load runs anything."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import Payload
from damaged_runs import is_equal
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, SequentialLR, StepLR
from trainers import Job, train

import dist_optim
from dist_optim.checkpoint import load_optimizer, save_optimizer
from dist_optim.checkpoint.plain_loads import FORBID, FORCE, plain_loads
from dist_optim.errors import CheckpointError, HyperparameterError, ParameterError, StateDictError
from dist_optim.integrations.transformers.arguments import listed
from dist_optim.testing import RankPool
from train_arguments import read_arguments

Run = tuple[nn.Module, dist_optim.DistributedOptimizer]


def run_of(name: str = "adamw_torch", **options: Any) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = options.pop("groups", None)
    if groups is not None:
        options["params"] = groups(model)
    return model, dist_optim.build_optimizer(model, name, **{"lr": 0.1, **options}, print_audit=False)


def train_steps(run: Run, schedule: LRScheduler | None, num_steps: int) -> None:
    for _ in range(num_steps):
        for parameter in run[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        run[1].step()
        if schedule is not None:
            schedule.step()


# Hyperparameters of the build ---------------------------------------------------------------------------------------


def test_another_hyperparameter_is_refused_or_takes_the_value_of_the_build(tmp_path: Path) -> None:
    first = run_of(weight_decay=0.1, betas=(0.8, 0.9))
    train_steps(first, None, 2)
    dist_optim.save_checkpoint(tmp_path / "run", *first)
    second = run_of(weight_decay=0.2)
    before = [one.clone() for one in second[0].parameters()]
    with pytest.raises(StateDictError, match=r"betas of group 0 is \[0.8, 0.9\] in it and \[0.9, 0.999\] here .differ"):
        dist_optim.load_checkpoint(tmp_path / "run", *second)
    with pytest.raises(StateDictError, match=r"weight_decay of group 0 is 0.1 .*--allow_changed betas,weight_decay\)"):
        dist_optim.load_checkpoint(tmp_path / "run", *second, allow_changed=["betas"])
    with pytest.raises(HyperparameterError, match="'decay', which is no hyperparameter of adamw_torch. Known: amsgrad"):
        dist_optim.load_checkpoint(tmp_path / "run", *second, allow_changed=["decay"])
    with pytest.raises(ParameterError, match=r"one string.*Pass \['lr'\]"):
        dist_optim.load_checkpoint(tmp_path / "run", *second, allow_changed="lr")
    assert is_equal(before, list(second[0].parameters())) and second[1].num_steps == 0
    dist_optim.load_checkpoint(tmp_path / "run", *second, allow_changed=["weight_decay", "betas"])
    (group,) = second[1].param_groups
    assert (group["weight_decay"], group["betas"], second[1].num_steps) == (0.2, (0.9, 0.999), 2)
    with pytest.raises(StateDictError, match="other hyperparameters"):
        load_optimizer(tmp_path / "run" / "optimizer", run_of()[1])
    third = run_of()[1]
    load_optimizer(tmp_path / "run" / "optimizer", third, allow_changed=("weight_decay", "betas"))
    assert third.param_groups[0]["weight_decay"] == run_of()[1].param_groups[0]["weight_decay"]


def test_what_training_moves_is_no_other_hyperparameter(tmp_path: Path) -> None:
    first = run_of()
    schedule = StepLR(first[1], 1, 0.5)
    train_steps(first, schedule, 2)
    first[1].param_groups[0]["weight_decay"] = 0.7  # as a user may do in the middle of a run
    dist_optim.save_checkpoint(tmp_path / "run", *first, schedule)
    second = run_of()
    dist_optim.load_checkpoint(tmp_path / "run", *second, StepLR(second[1], 1, 0.5))
    assert (second[1].param_groups[0]["lr"], second[1].param_groups[0]["weight_decay"]) == (0.025, 0.7)
    third = run_of(groups=lambda model: [{"params": list(model.parameters()), "lr": 0.01, "initial_lr": 0.1}])
    dist_optim.load_checkpoint(tmp_path / "run", *third)  # built as torch wants it for a schedule made again


SCHEDULES: dict[str, Any] = {
    "step": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 8),
    "sequence": lambda optimizer: SequentialLR(
        optimizer,
        [LambdaLR(optimizer, lambda step: (1 + step) / 4), StepLR(optimizer, 2, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_rate_goes_on_where_the_schedule_is(name: str, tmp_path: Path) -> None:
    make = SCHEDULES[name]
    first, always = run_of(), run_of(lr=0.2)
    schedule, schedule_of_always = make(first[1]), make(always[1])
    train_steps(first, schedule, 3)
    train_steps(always, schedule_of_always, 3)
    dist_optim.save_checkpoint(tmp_path / "run", *first, schedule)
    second = run_of(lr=0.2)
    resumed = make(second[1])
    with pytest.raises(StateDictError, match=r"lr of group 0 is 0.1 in it and 0.2 here"):
        dist_optim.load_checkpoint(tmp_path / "run", *second, resumed)
    dist_optim.load_checkpoint(tmp_path / "run", *second, resumed, allow_changed=["lr"])
    for _ in range(4):
        rates = [run[1].param_groups[0]["lr"] for run in (second, always)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-12), name
        train_steps(second, resumed, 1)
        train_steps(always, schedule_of_always, 1)


def by_kind(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [one for one in model.parameters() if one.ndim == 2]},
        {"params": [one for one in model.parameters() if one.ndim == 1], "weight_decay": 0.0},
    ]


def test_another_order_of_groups_or_parameters_is_refused(tmp_path: Path) -> None:
    first = run_of(groups=by_kind)
    train_steps(first, None, 1)
    save_optimizer(tmp_path / "run", first[1])
    with pytest.raises(StateDictError, match="same param groups in another order: group 0 begins with .*'0.weight'"):
        load_optimizer(tmp_path / "run", run_of(groups=lambda model: by_kind(model)[::-1])[1])

    def turned(model: nn.Module) -> list[dict[str, Any]]:
        return [{**group, "params": group["params"][::-1]} for group in by_kind(model)]

    with pytest.raises(StateDictError, match="another order"):
        load_optimizer(tmp_path / "run", run_of(groups=turned)[1])
    with pytest.raises(StateDictError, match=r"weight_decay of group 1 is 0.0 in it and 0.3 here"):
        other = run_of(groups=lambda model: [by_kind(model)[0], {**by_kind(model)[1], "weight_decay": 0.3}])
        load_optimizer(tmp_path / "run", other[1])
    load_optimizer(tmp_path / "run", run_of(groups=by_kind)[1])


def test_arguments_that_a_version_does_not_know_count_as_their_defaults(tmp_path: Path) -> None:
    first = run_of()
    with mock.patch("dist_optim.checkpoint.optimizer_content.build_values", return_value=[{"lr": 0.1}]):
        save_optimizer(tmp_path / "run", first[1])
    load_optimizer(tmp_path / "run", run_of()[1])
    with pytest.raises(StateDictError, match="weight_decay of group 0 is 'not set' in it and 0.3 here"):
        load_optimizer(tmp_path / "run", run_of(weight_decay=0.3)[1])


def other_rates_in_the_trainer(strategy: str, directory: str) -> list[list[float]]:
    first = Job("adamw_torch", {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"})
    train(first, strategy, Path(directory) / "first")
    resume = str(Path(directory) / "first" / "checkpoint-3")
    other = {**first.settings, "learning_rate": 5e-3, "weight_decay": 0.1}
    with pytest.raises(StateDictError, match=r"different: lr, weight_decay.*--allow_changed lr,weight_decay"):
        train(replace(first, settings=other, resume=resume), strategy, Path(directory) / "refused")
    allowed = {**other, "allow_changed": "lr, weight_decay"}
    resumed = train(replace(first, settings=allowed, resume=resume), strategy, Path(directory) / "second")
    straight = train(replace(first, settings=other), strategy, Path(directory) / "third")
    return [resumed.all("learning_rate")[-3:], straight.all("learning_rate")[-3:]]


@pytest.mark.parametrize("strategy", ["alone", "zero2"])
def test_the_trainer_and_its_schedule_go_on_with_another_rate(
    strategy: str, one_rank: RankPool, tmp_path: Path
) -> None:
    ((resumed, straight),) = one_rank.run(other_rates_in_the_trainer, strategy, str(tmp_path))
    assert resumed == pytest.approx(straight) and len(straight) == 3


def test_the_flag_takes_names_with_commas(tmp_path: Path) -> None:
    asked = read_arguments(["--output_dir", str(tmp_path), "--allow_changed", "lr, weight_decay"])
    assert listed(asked.allow_changed) == ["lr", "weight_decay"] == listed(["lr", "weight_decay"])
    assert listed(None) == listed("") == []


# One save is one ----------------------------------------------------------------------------------------------------


def test_a_mixture_is_refused_with_both_saves_named(tmp_path: Path) -> None:
    run = run_of()
    for _ in range(2):
        train_steps(run, None, 1)
        dist_optim.save_checkpoint(tmp_path / f"{run[1].num_steps}", *run)
    shutil.copytree(tmp_path / "1", tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "optimizer")
    shutil.copytree(tmp_path / "2" / "optimizer", tmp_path / "mixed" / "optimizer")
    with pytest.raises(
        CheckpointError, match=r"checkpoint.json \(step 1 of 'adamw_torch', save \w+\): .* or of step 2"
    ):
        dist_optim.load_checkpoint(tmp_path / "mixed", *run)
    records = [
        tmp_path / folder / name for folder in ("1", "2") for name in ("checkpoint.json", "optimizer/optimizer.json")
    ]
    words = [json.loads(path.read_text())["identity"] for path in records]
    assert words[0] == words[1] != words[2] == words[3]


def test_formats_of_before_are_refused(tmp_path: Path) -> None:
    run = run_of()
    dist_optim.save_checkpoint(tmp_path / "run", *run)
    for name in ("optimizer/optimizer.json", "checkpoint.json"):
        path = tmp_path / "run" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
        with pytest.raises(CheckpointError, match="has a format that this version of dist_optim does not know"):
            if name == "checkpoint.json":
                dist_optim.load_checkpoint(tmp_path / "run", *run)
            else:
                load_optimizer(tmp_path / "run" / "optimizer", run[1])


# Loads of other packages --------------------------------------------------------------------------------------------


class Unknown:
    pass


def test_loads_of_other_packages_make_only_what_is_listed(tmp_path: Path) -> None:
    executed, file, index = tmp_path / "executed", tmp_path / "file.pt", tmp_path / "index"
    torch.save(Payload(executed), file)
    with plain_loads(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(file, weights_only=False)
    with (
        pytest.raises(CheckpointError, match=r"names \w+\.mkdir, which may be.*add_safe_globals"),
        plain_loads(),
    ):
        torch.load(file, weights_only=False)
    index.mkdir()
    (index / ".metadata").write_bytes(pickle.dumps(Payload(executed)))
    with pytest.raises(CheckpointError, match=r"names \w+\.mkdir"), plain_loads():
        dcp.load({"weight": torch.ones(2)}, storage_reader=dcp.FileSystemReader(index))
    assert not executed.exists()
    dcp.save({"weight": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(index))
    content = (index / ".metadata").read_bytes()
    (index / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../../e/f.ts"))
    with pytest.raises(CheckpointError, match=r"names '../../e/f.ts', which is no file of the folder"), plain_loads():
        dcp.load({"weight": torch.ones(2)}, storage_reader=dcp.FileSystemReader(index))
    torch.save(Unknown(), file)
    with pytest.raises(CheckpointError, match=r"names test_checkpoint_identity\.Unknown"), plain_loads():
        torch.load(file, weights_only=False)
    with plain_loads([Unknown]), mock.patch.dict(os.environ):
        assert isinstance(torch.load(file, weights_only=False), Unknown)


def test_outside_everything_is_as_before(tmp_path: Path) -> None:
    torch.save(Unknown(), tmp_path / "file.pt")
    with mock.patch.dict(os.environ, {FORBID: "1"}):
        reader = dcp.FileSystemReader.read_metadata
        with plain_loads():
            assert os.environ[FORCE] == "1" and FORBID not in os.environ
        assert os.environ[FORBID] == "1" and FORCE not in os.environ and dcp.FileSystemReader.read_metadata is reader
    assert isinstance(torch.load(tmp_path / "file.pt", weights_only=False), Unknown), "the control"
