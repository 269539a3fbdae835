"""``inspect``: what is in a checkpoint; every kind of damage is told; two are compared element by element."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from placements import place
from test_import import Tripwire
from torch import nn
from typer.testing import CliRunner

import dist_optim
from dist_optim.checkpoint import inspect, save_optimizer
from dist_optim.checkpoint.identity import write_record
from dist_optim.cli import app
from dist_optim.errors import CheckpointError
from dist_optim.testing import RankPool


def small(placement: str = "none", steps: int = 2, name: str = "adamw_torch") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = place(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), placement)
    optimizer = dist_optim.build_optimizer(model, name, lr=0.1, print_audit=False)
    optimizer.train()
    for step in range(steps):
        model(torch.linspace(0, step + 1, 12).view(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(directory: Path, placement: str = "none", steps: int = 2, name: str = "adamw_torch") -> None:
    model, optimizer = small(placement, steps, name)
    dist_optim.save_checkpoint(directory, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))


def test_what_is_in_it(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    found = inspect(tmp_path / "run")
    assert found.is_sound and not found.problems and not found.differences
    assert (found.optimizer, found.steps, found.mode, found.world_size) == ("adamw_torch", 2, "train", 1)
    assert found.groups[0]["params"] == 4 and found.groups[0]["lr"] == 0.1
    moments = 4 * 6 + 6 + 6 + 6
    assert (
        found.state["exp_avg (float32)"].elements == moments and found.state["exp_avg (float32)"].bytes == 4 * moments
    )
    assert found.state["step (float32)"].tensors == 4
    assert found.weights["float32"].elements == moments + 12 and found.weights["int64"].tensors == 1
    sizes = [one.stat().st_size for one in (tmp_path / "run").rglob("*") if one.is_file()]
    assert sum(found.files.values()) == sum(sizes)


def test_the_command(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0 and "adamw_torch after 2 steps, saved by 1 rank" in shown.output
    assert "exp_avg_sq (float32)" in shown.output and "Whole." in shown.output
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "run"), str(tmp_path / "run"), "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout)["is_sound"] is True
    (tmp_path / "run" / "scheduler.pt").write_bytes(b"nothing")
    wrong = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert wrong.exit_code == 1 and "WRONG" in wrong.output and "scheduler.pt" in wrong.output
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "nowhere")]).exit_code == 2


def test_parts_of_it(tmp_path: Path) -> None:
    _, optimizer = small(name="schedule_free_adamw")
    save_optimizer(tmp_path / "optimizer", optimizer)
    found = inspect(tmp_path / "optimizer")
    assert found.is_sound and found.world_size is None and not found.weights
    assert found.state["weights (float32)"].tensors == 4  # the training weights


# Damage ---------------------------------------------------------------------------------------------------------------


def edited(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        content = {key: value for key, value in json.loads((run / name).read_text()).items() if key != "digest"}
        edit(content)
        write_record(run / name, content)

    return act


def removed(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        (run / name).write_bytes(content)

    return act


def cut(pattern: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        (file,) = run.glob(pattern)
        file.write_bytes(file.read_bytes()[:-100])

    return act


def of_another_save(part: str, **options: Any) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        saved(run.parent / "other", **options)
        if (run / part).is_dir():
            shutil.rmtree(run / part)
            shutil.copytree(run.parent / "other" / part, run / part)
        else:
            shutil.copyfile(run.parent / "other" / part, run / part)

    return act


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut tensors": (cut("optimizer/tensors/*.distcp"), "missing or damaged"),
    "cut weights": (cut("model/*.distcp"), "missing or damaged"),
    "cut index": (cut("model/.metadata"), "no complete checkpoint"),
    "a file gone": (removed("model/__0_0.distcp"), "missing or damaged"),
    "a stray file": (replaced("model/__9_0.distcp", b"more"), "does not name it"),
    "no record": (removed("optimizer/optimizer.json"), "no optimizer of dist_optim"),
    "no JSON": (replaced("optimizer/optimizer.json", b"{"), "cannot be read"),
    "optimizer of another step": (of_another_save("optimizer", steps=1), "parts of several checkpoints"),
    "another optimizer": (of_another_save("optimizer", name="sgd"), "parts of several checkpoints"),
    "a rank gone": (removed("ranks/0.pt"), "no file"),
    "code in a rank's file": (lambda run: torch.save(Tripwire(), run / "ranks" / "0.pt"), "weights_only=True"),
    "another shape": (
        edited("optimizer/optimizer.json", lambda record: record["shapes"].update({"0.weight": [4, 6]})),
        "has the shape (6, 4)",
    ),
    "a parameter twice": (
        edited("optimizer/optimizer.json", lambda record: record["param_groups"][0]["params"].append("0.bias")),
        "name twice: 0.bias",
    ),
    "a parameter lost": (
        edited("optimizer/optimizer.json", lambda record: record["param_groups"][0]["params"].remove("0.bias")),
        "in no param group: 0.bias",
    ),
    "a wrong kind": (edited("optimizer/optimizer.json", lambda record: record.update(param_groups=7)), "damaged"),
    "no names in a group": (
        edited("optimizer/optimizer.json", lambda record: record["param_groups"][0].pop("params")),
        "damaged",
    ),
    "an order that fits none": (
        edited("optimizer/optimizer.json", lambda record: record["memory_orders"].update({"state/0.bias/step": [1]})),
        "fits no stored tensor",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_told(kind: str, tmp_path: Path) -> None:
    saved(tmp_path / "run")
    act, expected = DAMAGE[kind]
    act(tmp_path / "run")
    found = inspect(tmp_path / "run")
    assert not found.is_sound and any(expected in problem for problem in found.problems), found.problems


@pytest.mark.parametrize("part", ["model", "optimizer/tensors"])
def test_one_bit_of_a_tensor_is_told(part: str, tmp_path: Path) -> None:
    model, optimizer = small()
    dist_optim.save_checkpoint(tmp_path / "run", model, optimizer)
    first: Any = next(model.parameters())
    held = first if part == "model" else optimizer.state[first]["exp_avg"]
    (file,) = (tmp_path / "run" / part).glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[content.index(held.detach().numpy().tobytes())] ^= 1
    file.write_bytes(bytes(content))
    (problem,) = inspect(tmp_path / "run").problems
    assert "is damaged" in problem and part in problem


# Comparing ------------------------------------------------------------------------------------------------------------


def test_what_differs_is_told_by_how_much(tmp_path: Path) -> None:
    model, optimizer = small()
    dist_optim.save_checkpoint(tmp_path / "one", model, optimizer)
    first: Any = model[0].weight  # type: ignore[index]
    with torch.no_grad():
        first[0, 0] += 0.5
        optimizer.state[first]["exp_avg"][0, 0] = math.nan
    optimizer.param_groups[0]["lr"] = 0.2
    dist_optim.save_checkpoint(tmp_path / "two", model, optimizer)
    found = {one.what: one for one in inspect(tmp_path / "one", tmp_path / "two").differences}
    assert set(found) == {"model/0.weight", "state/0.weight/exp_avg", "param_groups[0].lr"}
    assert found["model/0.weight"].largest == pytest.approx(0.5)
    assert math.isnan(found["state/0.weight/exp_avg"].largest or 0.0)
    assert (found["param_groups[0].lr"].here, found["param_groups[0].lr"].there) == ("0.1", "0.2")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "one"), str(tmp_path / "two")])
    assert shown.exit_code == 1 and "model/0.weight" in shown.output and "3 differences" in shown.output


def test_another_optimizer_and_other_tensors_are_differences(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    saved(tmp_path / "two", name="adagrad")
    found = {one.what: one for one in inspect(tmp_path / "one", tmp_path / "two").differences}
    assert found["optimizer"].there == "'adagrad'" and found["state/0.bias/exp_avg"].there == "none"


def saved_by_two(placement: str, directory: Path) -> None:
    saved(directory, placement)


def test_the_number_of_ranks_makes_no_difference(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(saved_by_two, "fsdp2", tmp_path / "two")
    two_ranks.run(saved_by_two, "ddp", tmp_path / "one")
    found = inspect(tmp_path / "two", tmp_path / "one")
    assert found.is_sound, (found.problems, found.differences)
    assert found.world_size == 2


def test_the_path_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        inspect(tmp_path / "nowhere")
