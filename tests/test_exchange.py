"""Plans are balanced and deterministic; transfers deliver full tensors to owners and slices back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Item, assign_owners, make_plan, split_sizes
from dist_optim.exchange.transfer import Task, gather_to_owner, run_tasks, scatter_from_owner
from dist_optim.layouts import DimShard, FlatRange, Layout, Replicated
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank


def item(index: int, shape: tuple[int, ...], layout: Layout, cost: float | None = None) -> Item:
    size = torch.Size(shape)
    return Item(index, size, layout, torch.float32, torch.device("cpu"), float(cost or size.numel()))


def test_each_owner_gets_half_of_time_and_of_elements() -> None:
    # Four costly small tensors and four cheap large ones: time alone or size alone would leave the other lopsided.
    items = [item(i, (10, 10), Replicated(), cost=1000) for i in range(4)]
    items += [item(4 + i, (100, 10), Replicated(), cost=1) for i in range(4)]
    owners = assign_owners(items, 2)
    assert sorted(owners[:4]) == sorted(owners[4:]) == [0, 0, 1, 1]


def test_state_is_balanced_within_the_largest_matrix() -> None:
    shapes = [(64, 64), (64, 172), (172, 64), (64, 32)] * 8 + [(500, 64)]
    items = [item(i, shape, Replicated()) for i, shape in enumerate(shapes)]
    for world_size in (2, 3, 4, 8):
        owners = assign_owners(items, world_size)
        loads = [sum(math.prod(shapes[i]) for i, o in enumerate(owners) if o == r) for r in range(world_size)]
        assert max(loads) <= sum(loads) / world_size + 500 * 64
        assert max(loads) <= 1.1 * sum(loads) / world_size


def test_what_lies_whole_on_one_rank_is_stepped_there() -> None:
    # As ZeRO-1/2 cut a group: everything before the boundary on rank 0, one tensor cut by it, the rest on rank 1.
    bounds = [(0, 100, 100)] * 4 + [(0, 50, 100)] + [(0, 0, 100)] * 3
    items = [item(i, (10, 10), FlatRange(cuts)) for i, cuts in enumerate(bounds)]
    plan = make_plan(items, 2, bucket_numel=1000)
    assert [plan.owners[i] for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1], "the cut one goes to the lighter rank"
    sent = [split_sizes(bucket, rank)[0][1 - rank] for bucket in plan.buckets for rank in range(2)]
    assert sum(sent) == 50, "only the other rank's half of the cut tensor travels"


def test_every_item_travels_once_and_kinds_do_not_mix() -> None:
    layouts: list[Layout] = [Replicated(), DimShard(0, 3)]
    items = [item(i, (i + 1, 4), layouts[i % 2]) for i in range(20)]
    plan = make_plan(items, 3, bucket_numel=50)
    travelled = [member.index for bucket in plan.buckets for member in bucket.items]
    assert sorted(travelled) == list(range(20))
    for bucket in plan.buckets:
        assert {member.layout.is_replicated for member in bucket.items} == {bucket.is_replicated}
        for owner, owned in enumerate(bucket.owned):
            assert all(plan.owners[member.index] == owner for member in owned)
            assert len(owned) <= 1 or sum(member.shape.numel() for member in owned) <= 50
    assert make_plan(items, 3, bucket_numel=50) == plan


CASES: list[tuple[Layout, tuple[int, ...]]] = [
    (DimShard(dim=0, world_size=3), (7, 4)),  # 3 + 3 + 1 rows
    (DimShard(dim=0, world_size=3), (2, 4)),  # the last rank holds nothing
    (DimShard(dim=1, world_size=3), (4, 6)),  # columns
    (FlatRange(bounds=(0, 5, 5, 12)), (3, 4)),  # cut inside a row; rank 1 is empty
    (Replicated(), (3, 4)),
]


def full_tensor(index: int, shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel(), dtype=torch.float32).view(shape) + 100 * index


def there_and_back() -> None:
    rank, problems = dist.get_rank(), []
    for layouts in itertools.permutations(CASES[:4], 2):
        problems += _round_trip([item(i, shape, layout) for i, (layout, shape) in enumerate(layouts)], rank)
    replicated = [item(i, (i + 1, 3), Replicated()) for i in range(5)]
    problems += _round_trip(replicated, rank)
    assert_no_problems_on_any_rank(problems)


def _round_trip(items: list[Item], rank: int) -> list[str]:
    """Owners must see the full tensors; what they write (the negative) must reach every rank's slices."""
    plan = make_plan(items, dist.get_world_size(), bucket_numel=12)
    shapes = {member.index: member.shape for member in items}
    local = {m.index: m.layout.view_of(full_tensor(m.index, m.shape), rank).clone() for m in items}
    problems: list[str] = []

    def task(number: int) -> Task[None]:
        bucket = plan.buckets[number]
        twice = {index: 2 * tensor for index, tensor in local.items()}
        full, doubled = yield from gather_to_owner(bucket, [local, twice], None)
        for index, tensor in full.items():
            right = torch.equal(tensor, full_tensor(index, shapes[index])) and torch.equal(doubled[index], 2 * tensor)
            problems.extend([] if right else [f"item {index} arrived as {tensor.tolist()}"])
        yield from scatter_from_owner(bucket, {i: -t for i, t in full.items()}, local, None)

    run_tasks(task(number) for number in range(len(plan.buckets)))
    for member in items:
        expected = -member.layout.view_of(full_tensor(member.index, member.shape), rank)
        if not torch.equal(local[member.index], expected):
            problems.append(f"item {member.index} came back as {local[member.index].tolist()}")
    return problems


def test_owners_receive_full_tensors_and_slices_come_back(three_ranks: RankPool) -> None:
    three_ranks.run(there_and_back)


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_tasks_advance_in_the_same_order_whatever_they_hold(num_in_flight: int) -> None:
    log: list[str] = []

    def task(name: str) -> Task[None]:
        log.append(f"{name} starts")
        yield
        log.append(f"{name} steps")
        yield
        log.append(f"{name} ends")

    run_tasks((task(name) for name in "abc"), num_in_flight)
    assert [entry for entry in log if entry.startswith("a")] == ["a starts", "a steps", "a ends"]
    assert [entry for entry in log if entry.endswith("ends")] == ["a ends", "b ends", "c ends"]
    running = [sum(e.endswith("starts") for e in log[:n]) - sum(e.endswith("ends") for e in log[:n]) for n in range(10)]
    assert max(running) == num_in_flight
