"""Layouts: the pieces of all ranks tile the full tensor, and agree with what the engines really store."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import ParameterError
from dist_optim.layouts import DimShard, FlatRange, Layout, Replicated, detect
from dist_optim.layouts.detect import assert_held_by
from dist_optim.layouts.layout import boxes_on
from dist_optim.testing import RankPool, assert_equal, assert_no_problems_on_any_rank

CASES = [
    (DimShard(dim=0, world_size=3), (7, 4)),  # 3 + 3 + 1 rows
    (DimShard(dim=0, world_size=3), (2, 4)),  # the last rank holds nothing
    (DimShard(dim=1, world_size=2), (4, 5)),  # columns: views that are not contiguous
    (DimShard(dim=0, world_size=4), (5, 3)),  # chunks of 2 fill ranks 0..2, rank 3 is empty
    (FlatRange(bounds=(0, 5, 5, 12)), (3, 4)),  # cut inside a row; rank 1 is empty
]


@pytest.mark.parametrize(("layout", "shape"), CASES, ids=str)
def test_pieces_of_all_ranks_tile_the_tensor(layout: DimShard | FlatRange, shape: tuple[int, ...]) -> None:
    full = torch.arange(math.prod(shape)).view(shape)
    num_ranks = layout.world_size if isinstance(layout, DimShard) else len(layout.bounds) - 1
    seen = torch.zeros_like(full)
    for rank in range(num_ranks):
        layout.view_of(seen, rank).add_(1)
        assert layout.numel_on(full.shape, rank) == layout.view_of(full, rank).numel()
    assert_equal(seen, torch.ones_like(full))


@pytest.mark.parametrize(("layout", "shape"), [*CASES, (FlatRange((0, 3, 17, 60)), (3, 4, 5))], ids=str)
def test_boxes_name_the_blocks_that_a_rank_stores(layout: DimShard | FlatRange, shape: tuple[int, ...]) -> None:
    full = torch.arange(math.prod(shape)).view(shape)
    num_ranks = layout.world_size if isinstance(layout, DimShard) else len(layout.bounds) - 1
    for rank in range(num_ranks):
        stored = []
        for box in boxes_on(layout, full.shape, rank):
            block = full
            for dim, (start, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                block = block.narrow(dim, start, length)
            stored += block.flatten().tolist()
        assert stored == layout.view_of(full, rank).flatten().tolist()


def test_replicated_layout_is_the_tensor_itself() -> None:
    full = torch.arange(6.0)
    assert Replicated().view_of(full, 1) is full


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False))
        self.module = nn.Linear(4, 4)  # a user's own module may have the name that wrappers use
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


NAMES = ["embedding.weight", "inner.0.weight", "inner.0.bias", "inner.1.weight", "module.weight", "module.bias"]


def names_are_those_of_the_plain_model() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    problems = []
    checkpointed = Tied()
    checkpointed.inner[0] = checkpoint_wrapper(checkpointed.inner[0])
    wrapped = {
        "plain": Tied(),
        "ddp": DistributedDataParallel(Tied()),
        "compiled": torch.compile(Tied()),
        "ddp of compiled": DistributedDataParallel(torch.compile(Tied())),
        "activation checkpointing": checkpointed,
    }
    for kind, model in wrapped.items():
        found = list(detect(model))  # type: ignore[arg-type]
        if found != NAMES:
            problems.append(f"{kind}: {found}")
    assert_no_problems_on_any_rank(problems)


def test_names_are_those_of_the_plain_model_under_every_wrapper(two_ranks: RankPool) -> None:
    two_ranks.run(names_are_those_of_the_plain_model)


def detected_layout_gives_the_stored_shard() -> None:
    problems = []
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for dim in (0, 1):
        model = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 6, bias=False))
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        if dim == 1:  # FSDP2 shards other dims evenly only
            model = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Linear(6, 6, bias=False))
            expected = {name: p.detach().clone() for name, p in model.named_parameters()}
            model[0].weight = nn.Parameter(torch.randn(6, 6))
            expected["0.weight"] = model[0].weight.detach().clone()
        from torch.distributed.tensor import Shard

        fully_shard(model, mesh=mesh, shard_placement_fn=partial(lambda chosen, _: Shard(chosen), dim))
        for name, placed in detect(model).items():
            layout: Layout = placed.layout
            if not torch.equal(placed.local(), layout.view_of(expected[name], torch.distributed.get_rank())):
                problems.append(f"dim {dim}, {name}: {placed.layout}")
    assert_no_problems_on_any_rank(problems)


def test_detected_layout_gives_the_shard_that_fsdp2_stores(two_ranks: RankPool, three_ranks: RankPool) -> None:
    two_ranks.run(detected_layout_gives_the_stored_shard)
    three_ranks.run(detected_layout_gives_the_stored_shard)


def another_model_is_told_from_a_wrapped_one() -> None:
    makers: tuple[Callable[[nn.Linear], Any], ...] = (lambda net: net, DistributedDataParallel, fully_shard)
    for make in makers:
        model = make(nn.Linear(4, 4))
        placed = list(detect(model).values())
        model(torch.ones(2, 4))  # FSDP2's root stays gathered
        assert_held_by(model, placed)
        assert_held_by(nn.Sequential(model), placed)
        with pytest.raises(ParameterError, match="'weight' of the optimizer is not a parameter of this Linear"):
            assert_held_by(nn.Linear(4, 4), placed)


def test_another_model_is_told_from_a_wrapped_one(two_ranks: RankPool) -> None:
    two_ranks.run(another_model_is_told_from_a_wrapped_one)
