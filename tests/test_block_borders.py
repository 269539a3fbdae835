"""8-bit state is stepped where it lies, wherever no block of it is cut: no exchange, and the bits of whole tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import sessions
import torch
import torch.distributed as dist
from every_situation import EVERY_ROW
from placements import full_parameters, inject, own_group, place
from sessions import ENGINES, Engine, TorchSession
from situations import REFUSED, RIGHT, Outcome, Situation, cell
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_doors
from torch.distributed.tensor import distribute_tensor

import dist_optim
from dist_optim.errors import StateDictError
from dist_optim.layouts import BoxShard, DimShard
from dist_optim.optimizers.bnb import BitsAndBytesDriver
from dist_optim.ranks.agreement import gather_objects
from dist_optim.specs.registry import get_spec
from dist_optim.testing import RankFailure, RankPool, assert_equal

ON_ROWS = {2: {"first.weight", "second.weight", "words.weight", "small.weight"}, 4: {"first.weight", "words.weight"}}
"""By the number of shards, what needs no exchange: ``second`` falls below 4096 elements a rank, and keeps 8 bits."""
FULL = torch_doors.StateDictOptions(full_state_dict=True)


class Net(nn.Module):
    """Rows of two blocks, of one, of a part of one; an embedding, with 32 bits; and sizes that ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(512, 67)
        self.second = nn.Linear(256, 34, bias=False)
        self.third = nn.Linear(100, 90, bias=False)
        self.words = nn.Embedding(70, 256)
        self.small = nn.Linear(256, 6, bias=False)


class Run:
    """A model and its optimizer, stepped by the same gradients under every engine."""

    def __init__(self, placement: str, name: str, group: Any = None, dtype: torch.dtype = torch.float32) -> None:
        self.model = place(Net().to(dtype), placement)
        options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "process_group": group, "print_audit": False}
        options["master_weights"] = dtype is not torch.float32
        self.optimizer = dist_optim.build_optimizer(self.model, name, **options)

    def train(self, steps: range) -> None:
        for step in steps:
            dtype = next(self.model.parameters()).dtype
            inject(self.model, {name: one.to(dtype) for name, one in gradients(step).items()})
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return full_parameters(self.model)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(one.shape, generator=generator) for name, one in Net().named_parameters()}


def alone(name: str, steps: range, dtype: torch.dtype = torch.float32) -> Run:
    run = Run("none", name, own_group(), dtype)
    run.train(steps)
    return run


def stepped_on_rows(optimizer: dist_optim.DistributedOptimizer) -> set[str]:
    return {optimizer.holdings.placed[index].fqn for index in optimizer.holdings.local_indices}


def equals_one_process(
    placement: str, name: str, folder: Path, num_shards: int, dtype: torch.dtype = torch.float32
) -> None:
    """And is resumed from its checkpoint under other engines, and there from theirs."""
    expected = alone(name, range(6), dtype).weights()
    run = Run(placement, name, None, dtype)
    assert stepped_on_rows(run.optimizer) == ON_ROWS[num_shards]
    run.train(range(3))
    dist_optim.save_checkpoint(folder / "cut", run.model, run.optimizer)
    run.train(range(3, 6))
    assert_equal(run.weights(), expected)
    for place_, group in (("none", own_group()), ("ddp", None), (placement, None)):
        resumed = Run(place_, name, group, dtype)
        dist_optim.load_checkpoint(folder / "cut", resumed.model, resumed.optimizer)
        resumed.train(range(3, 6))
        assert_equal(resumed.weights(), expected)
    whole = Run("ddp", name, None, dtype)
    whole.train(range(3))
    dist_optim.save_checkpoint(folder / "whole", whole.model, whole.optimizer)
    resumed = Run(placement, name, None, dtype)
    dist_optim.load_checkpoint(folder / "whole", resumed.model, resumed.optimizer)
    resumed.train(range(3, 6))
    assert_equal(resumed.weights(), expected)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "lion_8bit"])
def test_two_ranks(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(equals_one_process, "fsdp2", name, tmp_path, 2)


def test_masters_of_half_precision_too(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(equals_one_process, "fsdp2", "adamw_bnb_8bit", tmp_path, 2, torch.bfloat16)


@pytest.mark.parametrize(("placement", "num_shards"), [("fsdp2 units", 4), ("hsdp", 2)])
def test_four_ranks(placement: str, num_shards: int, four_ranks: RankPool, tmp_path: Path) -> None:
    four_ranks.run(equals_one_process, placement, "adamw_bnb_8bit", tmp_path, num_shards)


def through_torch() -> None:
    """Whole, into upstream's own class; cut and whole, into another of ours; and upstream's own into ours."""
    expected = alone("adamw_bnb_8bit", range(6)).weights()
    run = Run("fsdp2", "adamw_bnb_8bit")
    run.train(range(3))
    upstream, model = of_upstream(run.weights())
    whole = torch_doors.get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
    torch_doors.set_optimizer_state_dict(model, upstream, whole)
    train_upstream(model, upstream, range(3, 6))
    assert_equal(dict(model.named_parameters()), expected)
    for options in (FULL, None):
        state = torch_doors.get_optimizer_state_dict(run.model, run.optimizer, options=options)
        resumed = Run("fsdp2", "adamw_bnb_8bit")
        resumed.model.load_state_dict(run.model.state_dict())
        torch_doors.set_optimizer_state_dict(resumed.model, resumed.optimizer, state, options=options)
        resumed.train(range(3, 6))
        assert_equal(resumed.weights(), expected)
    upstream, model = of_upstream(dict(Net().named_parameters()))
    train_upstream(model, upstream, range(3))
    resumed = Run("fsdp2", "adamw_bnb_8bit")
    with torch.no_grad():
        for name, one in resumed.model.named_parameters():
            one.copy_(place_like(dict(model.named_parameters())[name].detach(), one))
    torch_doors.set_optimizer_state_dict(
        resumed.model, resumed.optimizer, torch_doors.get_optimizer_state_dict(model, upstream), options=FULL
    )
    resumed.train(range(3, 6))
    assert_equal(resumed.weights(), expected)


def place_like(full: Tensor, one: Any) -> Tensor:
    return distribute_tensor(full, one.device_mesh, one.placements, src_data_rank=None)


def of_upstream(weights: dict[str, Tensor]) -> tuple[torch.optim.Optimizer, nn.Module]:
    """bitsandbytes' own, as the Trainer builds it: 32 bits for the embedding."""
    model = Net()
    model.load_state_dict(weights)
    manager_class = bitsandbytes.optim.GlobalOptimManager
    manager_class._instance = None
    manager_class.get_instance().register_module_override(model.words, "weight", {"optim_bits": 32})
    rest = [one for name, one in model.named_parameters() if name != "words.weight"]
    groups = [{"params": rest}, {"params": [model.words.weight]}]
    return bitsandbytes.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, optim_bits=8), model


def train_upstream(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, one in model.named_parameters():
            one.grad = gradients(step)[name]
        optimizer.step()


def test_torchs_doors(two_ranks: RankPool) -> None:
    two_ranks.run(through_torch)


HAPPENS = {
    "evaluated, then saved and resumed": RIGHT,
    "mixed precision, evaluated, then saved": RIGHT,
    "loaded from before a layer's first gradient": RIGHT,
    "two optimizers on one model": RIGHT,
    "layers are frozen and unfrozen": RIGHT,
    "resumed through torch's own functions": RIGHT,
    "one rank fails in the step": REFUSED,
    "add_param_group between steps, GaLore": REFUSED,
}
"""Rows of docs/situations.md, and how they end."""


def happens(situation: Situation, engine: Engine) -> Outcome:
    with mock.patch.object(sessions, "SIZES", (256, 256, 48)):
        session = engine.session("adamw_bnb_8bit")
        assert isinstance(session, TorchSession)
        assert stepped_on_rows(session.optimizers[0]) > {"first.weight", "head.weight"}
        return cell(situation, engine)


@pytest.mark.parametrize("title", ["FSDP2", "HSDP"])
def test_situations(title: str, two_ranks: RankPool, four_ranks: RankPool) -> None:
    """In which a rank holds rows of 8-bit state."""
    engine = next(one for one in ENGINES if one.title == title)
    pool = {2: two_ranks, 4: four_ranks}[engine.num_ranks]
    rows = [one for one in EVERY_ROW if one.title in HAPPENS]
    as_one_name = [replace(row, optimizers=(like("adamw_bnb_8bit", row.optimizers[0]),)) for row in rows]
    chosen = as_one_name if engine.num_ranks == 2 else as_one_name[::3]
    found = {row.title: pool.run(happens, row, engine)[0] for row in chosen}
    assert {row: outcome.kind for row, outcome in found.items()} == {row: HAPPENS[row] for row in found}, found


def like(name: str, other: str) -> str:
    """The same name as often as there are names in the other: of one optimizer or of a pair."""
    return " + ".join([name] * len(other.split(" + ")))


def test_what_may_be_cut() -> None:
    values = {"optim_bits": 8, "min_8bit_size": 4096}
    driver = get_spec("adamw_bnb_8bit").driver
    shape = torch.Size([64, 256])
    assert driver.runs_on_rows(shape, 16, values) and not driver.runs_on_rows(shape, 15, values)
    assert driver.runs_on_rows(shape, 1, {**values, "optim_bits": 32})
    assert driver.runs_on_rows(torch.Size([15, 256]), 1, values)  # 32 bits, cut or not
    assert not driver.runs_on_rows(torch.Size([64, 255]), 32, values)
    assert DimShard(0, 4).fewest_rows(10) == 1 and DimShard(0, 4).fewest_rows(9) == 0
    assert DimShard(1, 4).fewest_rows(10) is None
    assert BoxShard(((0, 2), (0, 2)), ((0, 0), (0, 1), (1, 0), (1, 1))).fewest_rows(10) == 2
    assert BoxShard(((0, 2), (1, 2)), ((0, 0), (0, 1), (1, 0), (1, 1))).fewest_rows(10) is None


def scales_of_before() -> list[str]:
    """As a checkpoint from before had them: one after the other, and none cut."""
    with mock.patch.object(BitsAndBytesDriver, "encode_state", lambda self, state: dict(state)):
        state = torch_doors.get_optimizer_state_dict(*both(alone("adamw_bnb_8bit", range(2))), options=FULL)
        run = Run("fsdp2", "adamw_bnb_8bit")
        with pytest.raises(StateDictError, match="under DDP, and save it there again"):
            torch_doors.set_optimizer_state_dict(*both(run), state, options=FULL)
    return gather_objects(dist.get_rank())


def both(run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    return run.model, run.optimizer


def test_scales_that_are_not_cut_are_refused(two_ranks: RankPool) -> None:
    two_ranks.run(scales_of_before)


def cut_inside_blocks() -> None:
    with mock.patch.object(BitsAndBytesDriver, "runs_on_rows", lambda *_: True):
        expected = alone("adamw_bnb_8bit", range(6)).weights()
        run = Run("fsdp2", "adamw_bnb_8bit")
        run.train(range(6))
        assert_equal(run.weights(), expected)


def test_control_blocks_that_are_cut_give_other_bits(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="third.weight"):
        two_ranks.run(cut_inside_blocks)
