"""Plans are balanced and deterministic; transfers deliver full tensors to owners and slices back."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Item, Plan, assign_owners, make_plan
from dist_optim.exchange.rooms import Room, Rooms
from dist_optim.exchange.tasks import Task, run_tasks
from dist_optim.exchange.transfer import gather_to_owner, scatter_from_owner
from dist_optim.layouts import BoxShard, DimShard, FlatRange, Layout, Replicated
from dist_optim.layouts.holders import Holders
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
    plan = make_plan(items, 2, bucket_bytes=4000)
    assert [plan.owners[i] for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1], "the cut one goes to the lighter rank"
    sent = [bucket.route(rank).to_owners[1 - rank] for bucket in plan.buckets for rank in range(2)]
    assert sum(sent) == 50, "only the other rank's half of the cut tensor travels"


def test_every_item_travels_once_and_kinds_do_not_mix() -> None:
    layouts: list[Layout] = [Replicated(), DimShard(0, 3)]
    items = [item(i, (i + 1, 4), layouts[i % 2]) for i in range(20)]
    plan = make_plan(items, 3, bucket_bytes=200)
    travelled = [member.index for bucket in plan.buckets for member in bucket.items]
    assert sorted(travelled) == list(range(20))
    for bucket in plan.buckets:
        assert {member.layout.is_replicated for member in bucket.items} == {bucket.is_replicated}
        for owner, owned in enumerate(bucket.owned):
            assert all(plan.owners[member.index] == owner for member in owned)
            assert len(owned) <= 1 or sum(member.shape.numel() for member in owned) <= 50
        assert bucket.held_bytes <= 200 or len(bucket.items) == 1 or not bucket.is_replicated
    assert make_plan(items, 3, bucket_bytes=200) == plan


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
    plan = make_plan(items, dist.get_world_size(), bucket_bytes=48)
    shapes = {member.index: member.shape for member in items}
    local = {m.index: m.layout.view_of(full_tensor(m.index, m.shape), rank).clone() for m in items}
    # Every second one with its dims in another order in memory, as those of convolutions may be.
    local = {i: t.mT.contiguous().mT if i % 2 and t.ndim == 2 else t for i, t in local.items()}
    problems: list[str] = []

    def task(number: int) -> Task[None]:
        bucket = plan.buckets[number]
        twice = {index: 2 * tensor for index, tensor in local.items()}
        route = bucket.route(rank)
        full, doubled = yield from gather_to_owner(bucket, [local, twice], route, None)
        for index, tensor in full.items():
            right = torch.equal(tensor, full_tensor(index, shapes[index])) and torch.equal(doubled[index], 2 * tensor)
            problems.extend([] if right else [f"item {index} arrived as {tensor.tolist()}"])
        yield from scatter_from_owner(bucket, {i: -t for i, t in full.items()}, local, route, None)

    run_tasks(task(number) for number in range(len(plan.buckets)))
    for member in items:
        expected = -member.layout.view_of(full_tensor(member.index, member.shape), rank)
        if not torch.equal(local[member.index], expected):
            problems.append(f"item {member.index} came back as {local[member.index].tolist()}")
    return problems


IN_PLACE, PEERS = "dist_optim.exchange.route.IN_PLACE_BYTES", "dist_optim.exchange.transfer.MAX_PEERS"


def there_and_back_by(ways: dict[str, int]) -> None:
    with ExitStack() as stack:
        for where, value in ways.items():
            stack.enter_context(mock.patch(where, value))
        there_and_back()


@pytest.mark.parametrize(
    "ways",
    [{}, {IN_PLACE: 1}, {PEERS: 0}, {IN_PLACE: 1, PEERS: 0}],
    ids=["messages", "in place", "packs", "packs and broadcasts"],
)
def test_owners_receive_full_tensors_and_slices_come_back(ways: dict[str, int], three_ranks: RankPool) -> None:
    three_ranks.run(there_and_back_by, ways)


def message_of_the_users_during_a_round_trip() -> None:
    """Asked for before, sent after: it is not mistaken for one of ours, between the same ranks."""
    peer = 1 - dist.get_rank()
    theirs = torch.zeros(3)
    work = dist.irecv(theirs, group_src=peer)
    with mock.patch(IN_PLACE, 1):
        items = [item(i, (7, 4), DimShard(0, 2)) for i in range(4)]
        assert_no_problems_on_any_rank(_round_trip(items, dist.get_rank()))
    sent = dist.isend(torch.full((3,), 5.0), group_dst=peer)
    assert work is not None and sent is not None
    work.wait()
    sent.wait()
    assert theirs.tolist() == [5.0] * 3


def test_a_message_of_the_users_is_not_taken_for_ours(two_ranks: RankPool) -> None:
    two_ranks.run(message_of_the_users_during_a_round_trip)


def test_memory_is_taken_once_and_never_by_two_rounds_at_a_time() -> None:
    rooms, device = Rooms(), torch.device("cpu")
    seen = set()
    for _ in range(3):
        first, second = Room(rooms), Room(rooms)
        items = [item(i, (5, 3), DimShard(0, 2)) for i in range(2)]
        one = first.tensors(items, torch.float32, device)
        other = second.flat(7, torch.float32, device)
        assert other.untyped_storage().data_ptr() != one[0].untyped_storage().data_ptr()
        assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in one.values())
        assert one[0].data_ptr() + one[0].nbytes <= one[1].data_ptr()
        seen |= {other.untyped_storage().data_ptr(), one[0].untyped_storage().data_ptr()}
        first.close()
        second.close()
    assert len(seen) == 2
    dropped = Room(rooms).flat(30, torch.float32, device)  # of a round that failed: nobody gets it again
    assert Room(rooms).flat(30, torch.float32, device).data_ptr() != dropped.data_ptr()


def test_gathers_start_before_the_step_that_they_would_wait_for() -> None:
    log: list[str] = []

    def task(name: str) -> Task[None]:
        log.append(f"gather {name}")
        yield
        log.append(f"step {name}")
        yield
        log.append(f"end {name}")

    run_tasks(task(name) for name in "abcd")
    for before, after in ("ab", "bc", "cd"):
        assert log.index(f"gather {after}") < log.index(f"step {before}"), "in flight while the round before is stepped"
        assert log.index(f"step {after}") < log.index(f"end {before}"), "the way back has the time of the next step"
    assert [entry for entry in log if entry.startswith("end")] == [f"end {name}" for name in "abcd"]
    changes = [{"gather": 1, "step": 0, "end": -1}[entry.split()[0]] for entry in log]
    started = list(itertools.accumulate(changes))
    assert max(started) == 3


def test_owners_of_replicated_tensors_wait_for_nobody() -> None:
    log: list[str] = []

    def task(name: str) -> Task[None]:
        yield
        log.append(f"step {name}")
        yield
        log.append(f"end {name}")

    run_tasks((task(name) for name in "abcd"), holds_memory=False)
    assert log == [f"{what} {name}" for what in ("step", "end") for name in "abcd"]


ATTENTION = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)]
LLAMA_70B = [*ATTENTION, (28672, 8192), (28672, 8192), (8192, 28672), (8192,), (8192,)]


def questions_to_layouts(world_size: int) -> int:
    """How often planning Llama-70B's tensors asks a layout what a rank holds."""
    asked = 0

    class Counting(DimShard):
        def numel_on(self, shape: torch.Size, rank: int) -> int:
            nonlocal asked
            asked += 1
            return super().numel_on(shape, rank)

        def view_of(self, full: Tensor, rank: int) -> Tensor:
            raise AssertionError("planning makes no tensors")

    shapes = LLAMA_70B * 80 + [(128256, 8192), (128256, 8192), (8192,)]
    items = [
        Item(i, torch.Size(s), Counting(0, world_size), torch.bfloat16, torch.device("cpu"), float(math.prod(s)))
        for i, s in enumerate(shapes)
    ]
    plan = make_plan(items, world_size, bucket_bytes=64 << 20)
    assert len(plan.owners) == 723
    assert "parameters back" in str(plan)
    for bucket in plan.buckets:
        bucket.route(world_size // 2)
    return asked


def test_planning_does_not_grow_with_ranks_times_tensors() -> None:
    """At 4,096 ranks 3 million questions, were every rank asked of every tensor."""
    assert questions_to_layouts(4096) < 60_000
    assert questions_to_layouts(8) < 60_000


def test_a_round_takes_the_same_buffer_at_any_number_of_ranks() -> None:
    for world_size in (2, 8, 64):
        for layout in (Replicated(), DimShard(0, world_size)):
            items = [item(i, (64, 64), layout) for i in range(128)]
            plan = make_plan(items, world_size, bucket_bytes=16 * 64 * 64 * 4)
            assert max(bucket.held_bytes for bucket in plan.buckets) <= 16 * 64 * 64 * 4
            assert sum(bucket.nbytes for bucket in plan.buckets) == 128 * 64 * 64 * 4


def test_the_plan_tells_every_byte_that_travels() -> None:
    """Against what routes say, rank by rank."""
    layouts: list[Layout] = [DimShard(0, 3), FlatRange((0, 5, 30, 60))]
    assert_told(make_plan([item(i, (10, 6), layouts[i % 2]) for i in range(7)], 3, bucket_bytes=400), 3)


@pytest.mark.parametrize(
    "replicas",
    [BoxShard(((0, 2),), ((0,), (1,), (0,), (1,))), FlatRange((0, 30, 60), Holders((0, 1, 0, 1)))],
    ids=["rows", "ranges"],
)
def test_of_parts_that_several_ranks_hold_one_copy_goes_to_the_owner(replicas: Layout) -> None:
    """Two replicas of two shards: the owner reads its own replica, and writes both."""
    plan = make_plan([item(i, (10, 6), replicas) for i in range(7)], 4, bucket_bytes=400)
    assert_told(plan, 4)
    assert len(set(plan.owners.values())) == 4
    for bucket in plan.buckets:
        for owner, items in enumerate(bucket.owned):
            route = bucket.route(owner)
            assert route.from_holders[(owner + 2) % 4] == 0
            assert route.back.from_holders[(owner + 2) % 4] == sum(one.shape.numel() // 2 for one in items)


def assert_told(plan: Plan, num_ranks: int) -> None:
    for bucket in plan.buckets:
        routes = [bucket.route(rank) for rank in range(num_ranks)]
        ways = (routes, bucket.gathered_bytes), ([one.back for one in routes], bucket.scattered_bytes)
        for way, told in ways:
            sent = [one.to_owners for one in way]
            travels = sum(n for rank in range(num_ranks) for owner, n in enumerate(sent[rank]) if owner != rank)
            assert 4 * travels == told
            received = [one.from_holders for one in way]
            pairs = [(rank, owner) for rank in range(num_ranks) for owner in range(num_ranks)]
            assert all(sent[rank][owner] == received[owner][rank] for rank, owner in pairs)
            assert f"{told:,}" in str(plan)
