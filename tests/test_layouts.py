"""Layouts: the pieces of all ranks tile the full tensor, and agree with what the engines really store."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.errors import ParameterError, UnsupportedLayoutError
from dist_optim.layouts import DimShard, FlatRange, Layout, Replicated, detect
from dist_optim.layouts.detect import assert_held_by
from dist_optim.layouts.holders import Holders
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
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
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
            if not torch.equal(placed.local(), layout.view_of(expected[name], dist.get_rank())):
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


def hybrid(groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None) -> nn.Module:
    """A layer under FSDP1's hybrid sharding, over a pair of groups, or over those that FSDP1 makes."""
    torch.manual_seed(0)
    return FullyShardedDataParallel(
        nn.Sequential(nn.Linear(6, 5)),
        process_group=groups,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def groups_of(shards: list[list[int]], replicas: list[list[int]]) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's of each list."""
    made = [[dist.new_group(ranks) for ranks in several] for several in (shards, replicas)]
    own = [next(group for group in several if dist.get_rank(group) >= 0) for several in made]
    return own[0], own[1]


def replicas_of_fsdp1_are_found() -> None:
    rising = groups_of([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    weight = detect(hybrid(rising))["0.weight"]
    layout: Any = weight.layout
    assert weight.process_group is None
    assert layout == FlatRange(layout.bounds, Holders((0, 1, 0, 1))) and layout.copies == 2
    assert [list(layout.holders(rank)) for rank in range(4)] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert_equal(weight.local(), layout.view_of(plain_weight(), dist.get_rank()))

    apart = detect(hybrid(rising), shares_replicas=False)["0.weight"]
    assert apart.layout == FlatRange(layout.bounds) and apart.process_group is rising[0]

    other = groups_of([[0, 2], [1, 3]], [[0, 1], [2, 3]])
    crossed = detect(hybrid(other))["0.weight"]
    assert crossed.layout == FlatRange(layout.bounds) and crossed.process_group is other[0]


def plain_weight() -> torch.Tensor:
    torch.manual_seed(0)
    return nn.Linear(6, 5).weight.detach()


def test_replicas_of_fsdp1s_hybrid_sharding_share_the_work_in_rising_order(four_ranks: RankPool) -> None:
    """In another order each replica does all of it: a pair of groups says nothing of the other ranks'."""
    four_ranks.run(replicas_of_fsdp1_are_found)


def hybrid_of_lone_shards() -> tuple[list[float], str]:
    """What FSDP1 makes of ranks on CPUs: a gradient, and what we say."""
    model = hybrid(None)
    model(torch.full((1, 6), float(dist.get_rank()))).sum().backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    with pytest.raises(UnsupportedLayoutError) as caught:
        dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    return gradient.flatten()[:1].tolist(), str(caught.value)


def test_replicas_of_nothing_sharded_are_refused(two_ranks: RankPool) -> None:
    """The control: plain torch reduces no gradient between them."""
    (first, said), (second, _) = two_ranks.run(hybrid_of_lone_shards)
    assert first != second
    assert "one rank in each shard group" in said and "DistributedDataParallel" in said


def build_in_another_order(dim: int) -> str:
    """Of parameters that were not contiguous when they were wrapped; of 1 x 1 filters, which only look so.

    The first rank alone has a part of the filters.
    """
    model = nn.Sequential(nn.Conv2d(4, 2, dim), nn.Flatten(), nn.Linear(8, 64))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    try:
        dist_optim.build_optimizer(wrapped, "adafactor", lr=1e-2, print_audit=False)
    except UnsupportedLayoutError as error:
        return str(error)
    return ""


def test_what_fsdp1_flattens_in_another_order_than_rows_is_refused(two_ranks: RankPool) -> None:
    """Whole tensors were gathered in that order before: Adafactor's rows and columns were others."""
    for text in two_ranks.run(build_in_another_order, 2):
        assert "was not contiguous when FSDP1 wrapped it" in text and "torch.contiguous_format" in text
    assert two_ranks.run(build_in_another_order, 1) == ["", ""]
