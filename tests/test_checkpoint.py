"""Checkpoints: saved under one sharding and world size, resumed under another, equal to the run without a break."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import all_cases
from parity import Case, Gap, build_subject, differences, gaps_between, make_model, reference_history, take_step
from placements import full_parameters, place
from torch import nn

import dist_optim
from dist_optim.checkpoint import exported_weights, load_optimizer, save_optimizer
from dist_optim.checkpoint.blocks import Pieces, read_pieces
from dist_optim.errors import CheckpointError, DistOptimError, StateDictError
from dist_optim.testing import RankFailure, RankPool, assert_equal, assert_no_problems_on_any_rank

BREAK = 5
"""The step after which runs are saved: after a projector's refresh, before the next."""

BY_NAME = list({case.name: case for case in reversed(all_cases())}.values())
HALF_PRECISION = [
    case
    for case in all_cases()
    if case.dtype == torch.bfloat16 and case.name in ("adamw_torch", "flash_adamw", "galore_adamw", "grokadamw")
][:8]


WAYS = (
    ("fsdp1", 2, "fsdp1"),
    ("ddp", 3, "fsdp1"),
    ("fsdp2 units", 2, "ddp"),
    ("fsdp1", 3, "fsdp2"),
    ("fsdp2 units", 1, "none"),
)
"""Saved by two ranks under the first; so many ranks go on under the last."""
WAYS_OF = {
    str(case): (WAYS[at % len(WAYS)], WAYS[(at + 2) % len(WAYS)]) for at, case in enumerate([*BY_NAME, *HALF_PRECISION])
}
"""Two of them for each; `make reshard` takes every name through a chain of all strategies."""


def run_to_the_break(case: Case, placement: str, directory: Path) -> None:
    expected = reference_history(case)
    model = place(make_model(case), placement)
    optimizer = build_subject(case, model)
    for step in range(BREAK):
        take_step(case, model, optimizer, step)
    dist_optim.save_checkpoint(directory, model, optimizer)
    problems = differences(case, expected[BREAK - 1], full_parameters(model), "after saving")
    assert_no_problems_on_any_rank([f"{placement}: {problem}" for problem in problems])


def go_on(case: Case, placement: str, directory: Path) -> None:
    problems = [str(gap) for gap in gaps_after(case, placement, directory) if not gap.relative <= case.tolerance]
    assert_no_problems_on_any_rank([f"{placement}: {problem}" for problem in problems])


def gaps_after(case: Case, placement: str, directory: Path) -> list[Gap]:
    """Load, train to the end, and compare every parameter after every step with upstream in one process."""
    expected = reference_history(case)
    model = place(make_model(case), placement)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    optimizer = build_subject(case, model)
    dist_optim.load_checkpoint(directory, model, optimizer)
    gaps = gaps_between(expected[BREAK - 1], full_parameters(model), "after loading")
    for step in range(BREAK, case.steps):
        take_step(case, model, optimizer, step)
        gaps += gaps_between(expected[step], full_parameters(model), f"after step {step}")
    assert optimizer.num_steps == case.steps
    return gaps


@pytest.mark.parametrize("case", [*BY_NAME, *HALF_PRECISION], ids=str)
def test_a_run_goes_on_under_any_sharding(
    case: Case, one_rank: RankPool, two_ranks: RankPool, three_ranks: RankPool, tmp_path: Path
) -> None:
    pools = {1: one_rank, 2: two_ranks, 3: three_ranks}
    for saved_under, num_ranks, goes_on_under in WAYS_OF[str(case)]:
        two_ranks.run(run_to_the_break, case, saved_under, tmp_path / saved_under)
        pools[num_ranks].run(go_on, case, goes_on_under, tmp_path / saved_under)


@pytest.mark.parametrize("placement", ["hsdp", "fsdp1 hybrid"])
def test_replicas_of_the_shards_write_once_and_all_read(
    placement: str, four_ranks: RankPool, one_rank: RankPool, tmp_path: Path
) -> None:
    for case in (next(case for case in BY_NAME if case.name == name) for name in ("galore_adamw", "adamw_torch")):
        directory = tmp_path / case.name
        four_ranks.run(run_to_the_break, case, placement, directory)
        four_ranks.run(go_on, case, placement, directory)
        one_rank.run(go_on, case, "none", directory)


GALORE = next(case for case in BY_NAME if case.name == "galore_adamw")
SCHEDULE_FREE = next(case for case in BY_NAME if case.name == "schedule_free_adamw")


def go_on_with_projectors_laid_out_anew(case: Case, directory: Path) -> None:
    with mock.patch("dist_optim.checkpoint.optimizer_content._memory_order", return_value=[]):
        run_to_the_break(case, "ddp", directory)
    go_on(case, "ddp", directory)


def test_projectors_keep_their_order_in_memory(two_ranks: RankPool, tmp_path: Path) -> None:
    """The control: the same values in another order of dims are multiplied with another rounding."""
    with pytest.raises(RankFailure, match="differs after step"):
        two_ranks.run(go_on_with_projectors_laid_out_anew, GALORE, tmp_path / "run")


def saving_does_not_change_the_run(placement: str, directory: Path) -> None:
    expected = reference_history(SCHEDULE_FREE)
    model = place(make_model(SCHEDULE_FREE), placement)
    optimizer = build_subject(SCHEDULE_FREE, model)
    for step in range(SCHEDULE_FREE.steps):
        take_step(SCHEDULE_FREE, model, optimizer, step)
        training = full_parameters(model)
        with exported_weights(optimizer):
            exported = full_parameters(model)
        dist_optim.save_checkpoint(directory, model, optimizer)
        assert_equal(full_parameters(model), expected[step])
    optimizer.eval()
    assert_equal(full_parameters(model), exported)
    assert any(not torch.equal(exported[name], training[name]) for name in exported)
    rooms = {name: torch.empty_like(full) for name, full in exported.items()}
    read_pieces(directory / "model", {name: Pieces.whole(room) for name, room in rooms.items()}, None)
    assert_equal(rooms, exported)  # what a checkpoint holds as the model is the average


@pytest.mark.parametrize("placement", ["ddp", "fsdp2", "fsdp1"])
def test_averaged_weights_are_exported_and_training_goes_on(
    two_ranks: RankPool, tmp_path: Path, placement: str
) -> None:
    two_ranks.run(saving_does_not_change_the_run, placement, tmp_path / "run")


def small(width: int = 5, name: str = "adamw_torch") -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    torch.manual_seed(0)
    model = place(nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width)), "ddp")
    options: dict[str, Any] = {"rank": 2, "target_modules": "all-linear"} if name.startswith("galore") else {}
    optimizer = dist_optim.build_optimizer(model, name, lr=0.1, print_audit=False, **options)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def buffers_schedule_and_own_values_come_back(directory: Path) -> None:
    model, optimizer = small()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    schedule.step()
    rank = torch.distributed.get_rank()
    dist_optim.save_checkpoint(directory, model, optimizer, schedule, own={"rank": rank, "seen": [1, 2]})
    other_model, other = small()
    other_model(torch.zeros(3, 4))  # moves the running mean
    other_schedule = torch.optim.lr_scheduler.StepLR(other, 2, 0.5)
    own = dist_optim.load_checkpoint(directory, other_model, other, other_schedule)
    assert own == {"rank": rank, "seen": [1, 2]}
    assert_equal(dict(other_model.named_buffers()), dict(model.named_buffers()))
    assert other_schedule.state_dict() == schedule.state_dict()
    assert list(Path(directory).parent.iterdir()) == [Path(directory)]


def test_buffers_schedule_and_own_values_come_back(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(buffers_schedule_and_own_values_come_back, tmp_path / "run")


def refusal(action: Callable[[], object], kind: type[DistOptimError], words: str) -> None:
    with pytest.raises(kind, match=words):
        action()


def damage_is_refused_on_all_ranks(folder: Path) -> None:
    model, optimizer = small()
    directory = folder / "run"
    refusal(lambda: dist_optim.load_checkpoint(directory, model, optimizer), CheckpointError, "has no checkpoint.json")
    dist_optim.save_checkpoint(directory, model, optimizer)
    wide, galore = small(width=6), small(name="galore_adamw")
    refusal(lambda: dist_optim.load_checkpoint(directory, *wide), StateDictError, "with shape")
    refusal(lambda: load_optimizer(directory / "optimizer", wide[1]), StateDictError, "shape")
    refusal(lambda: dist_optim.load_checkpoint(directory, *galore), StateDictError, "is of 'adamw_torch'")
    refusal(lambda: dist_optim.save_checkpoint(directory, model, torch.optim.SGD([torch.ones(1)])), CheckpointError, "")
    refusal(
        lambda: dist_optim.save_checkpoint(directory, model, optimizer, own=Path("object")), CheckpointError, "plain"
    )
    dist_optim.load_checkpoint(directory, model, optimizer)  # the failed save left it as it was
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        data = next((directory / "optimizer" / "tensors").glob("*.distcp"))
        data.write_bytes(data.read_bytes()[:100])
    torch.distributed.barrier()
    refusal(lambda: dist_optim.load_checkpoint(directory, model, optimizer), CheckpointError, "damaged")


def test_damage_is_refused_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(damage_is_refused_on_all_ranks, tmp_path)


class Killed(BaseException):
    pass


def die_after(num_calls: int) -> Callable[[Path, Path], Path]:
    """A rename that ends the job at the n-th folder that would get another name."""
    calls, rename = itertools.count(), Path.rename

    def rename_or_die(self: Path, target: Path) -> Path:
        if self.is_dir() and next(calls) == num_calls:
            raise Killed
        return rename(self, target)

    return rename_or_die


@pytest.mark.parametrize("num_renames", [0, 1, 2])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, num_renames: int) -> None:
    model = nn.Linear(3, 3)
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, momentum=0.9, print_audit=False)
    directory = tmp_path / "run"

    def steps_in(folder: Path) -> int:
        fresh = dist_optim.build_optimizer(model, "sgd", lr=0.1, momentum=0.9, print_audit=False)
        load_optimizer(folder, fresh)
        return fresh.num_steps

    save_optimizer(directory, optimizer)
    optimizer.step()
    with mock.patch.object(Path, "rename", die_after(num_renames)):
        if num_renames < 2:
            with pytest.raises(Killed):
                save_optimizer(directory, optimizer)
        else:
            save_optimizer(directory, optimizer)
    assert steps_in(directory) == (1 if num_renames == 2 else 0)
    save_optimizer(directory, optimizer)  # what the kill left behind is no obstacle
    assert steps_in(directory) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
