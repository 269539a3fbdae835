"""What ranks agree on before they act: values gathered and compared, bits combined.

Every function here is a collective of the given process group: all its ranks call it, in the same order. Without an
initialised process group the caller is alone, and each is a local operation.
"""

from __future__ import annotations

import hashlib
import re
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dist_optim.errors import RanksDisagreeError
from dist_optim.overrides import check

__all__ = [
    "agree_on_bits",
    "assert_equal_where_named",
    "assert_ranks_equal",
    "assert_same_ranks_meant",
    "background_group",
    "described",
    "gather_objects",
    "group_of_ranks",
    "host_group",
    "num_ranks",
    "own_rank",
    "raise_first_difference",
    "reachable_devices",
]

ProcessGroup = dist.ProcessGroup


def num_ranks(process_group: ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 when torch.distributed is not initialised."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def own_rank(process_group: ProcessGroup | None = None) -> int:
    """This process's rank inside the group; 0 when torch.distributed is not initialised."""
    return dist.get_rank(process_group) if dist.is_available() and dist.is_initialized() else 0


def reachable_devices(process_group: ProcessGroup | None = None) -> set[str]:
    """Types of devices that the group communicates on."""
    return {part.partition(":")[0] for part in dist.get_backend_config(process_group).split(",")}


def gather_objects(value: Any, process_group: ProcessGroup | None = None) -> list[Any]:
    """Each rank's value, in rank order, on every rank."""
    if num_ranks(process_group) == 1:
        return [value]
    gathered: list[Any] = [None] * num_ranks(process_group)
    dist.all_gather_object(gathered, value, group=process_group)
    return gathered


def assert_ranks_equal(
    what: str, items: Sequence[tuple[str, Any]], remedy: str, process_group: ProcessGroup | None = None
) -> None:
    """Compare named values over the ranks: by a digest, and by their texts only where that differs. Collective.

    Raises:
        RanksDisagreeError: On all ranks, naming the first item that differs, two ranks and both their values.
    """
    if num_ranks(process_group) == 1:
        return
    listing = [(name, described(value)) for name, value in items]
    if not _are_equal(zlib.crc32(repr(listing).encode()), process_group):
        raise_first_difference(what, gather_objects(listing, process_group), remedy)


def raise_first_difference(what: str, listings: Sequence[Sequence[tuple[str, str]]], remedy: str) -> None:
    """Compare named texts that all ranks have gathered. Local, and the same everywhere.

    Raises:
        RanksDisagreeError: As ``assert_ranks_equal``.
    """
    for rank, listing in enumerate(listings):
        if listing == listings[0]:
            continue
        for mine, theirs in zip(listings[0], listing, strict=False):
            if mine != theirs:
                name = mine[0] if mine[0] == theirs[0] else f"{mine[0]} / {theirs[0]}"
                raise RanksDisagreeError(
                    f"{what}: {name} is {mine[1]} on rank 0 and {theirs[1]} on rank {rank}. {remedy}"
                )
        raise RanksDisagreeError(
            f"{what}: rank 0 has {len(listings[0])} entries and rank {rank} has {len(listing)}. {remedy}"
        )


def assert_equal_where_named(
    what: str, values: Mapping[str, Any], remedy: str, process_group: ProcessGroup | None = None
) -> None:
    """Compare each value between the ranks that give one under its name. Collective.

    Raises:
        RanksDisagreeError: On all ranks, naming the first one that differs, two ranks and both their values.
    """
    listings: list[Mapping[str, Any]] = gather_objects(values, process_group)
    first_with: dict[str, int] = {}
    for rank, listing in enumerate(listings):
        for name, value in listing.items():
            other = first_with.setdefault(name, rank)
            if listings[other][name] != value:
                raise RanksDisagreeError(
                    f"{what} {name} is {listings[other][name]} on rank {other} and {value} on rank {rank}. {remedy}"
                )


def assert_same_ranks_meant(ranks: Sequence[int], process_group: ProcessGroup | None = None) -> None:
    """Whether all that one wants a group with want the same: else they would wait for each other. Collective.

    Args:
        ranks: Those of the group that this rank wants, itself among them; empty where it wants none.
        process_group: All that may want one.

    Raises:
        RanksDisagreeError: On all ranks, naming two of them and what both want.
    """
    digest = zlib.crc32(repr(list(ranks)).encode())
    if num_ranks(process_group) == 1 or _are_equal(digest, process_group):
        return
    members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    digests = dict(zip(members, gather_objects(digest, process_group), strict=True))
    is_same = all(digests.get(other) == digest for other in ranks)
    if _are_equal(int(is_same), process_group) and is_same:
        return
    wanted: dict[int, list[int]] = dict(zip(members, gather_objects(list(ranks), process_group), strict=True))
    for rank, wants in wanted.items():
        for other in wants:
            if wanted.get(other) != wants:
                theirs = wanted.get(other) or "no group of their own"
                raise RanksDisagreeError(
                    f"The parameters of rank {rank} are cut over the ranks {wants}, and on rank {other} over {theirs}. "
                    "Place the same model in the same way on every rank before the optimizer is built."
                )


def described(value: Any) -> str:
    """A value as text that is the same on every rank: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _are_equal(number: int, process_group: ProcessGroup | None) -> bool:
    """Whether every rank gave the same number, which is not negative."""
    both = torch.tensor([number, -number], dtype=torch.int64, device="cpu")
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=host_group(process_group))
    largest, minus_smallest = both.tolist()
    return bool(largest == -minus_smallest)


def agree_on_bits(
    has: Sequence[bool],
    lacks: Sequence[bool],
    process_group: ProcessGroup | None = None,
    wait: Callable[[dist.Work], object] = lambda work: work.wait(),
) -> tuple[list[bool], list[bool]]:
    """Which entries any rank has, and which some rank lacks: one small message from each rank to each other one.

    gloo's all-reduce goes round a ring, twice, each message after the one before: more of them, and slower ones.

    Args:
        has: This rank's entries, in the same order on every rank.
        lacks: Entries that this rank should have and has not.
        process_group: One that communicates in the host's memory.
        wait: Waits for the collective.

    Returns:
        ``(any_has, any_lacks)``, each as long as ``has``.
    """
    num_bits, ranks = len(has) + len(lacks), num_ranks(process_group)
    mine = int(bytes((*has, *lacks)).translate(_AS_DIGITS), 2).to_bytes(-(-num_bits // 8), "big")
    sent = torch.frombuffer(bytearray(mine * ranks), dtype=torch.uint8)
    heard = sent.clone()
    wait(dist.all_to_all_single(heard, sent, group=process_group, async_op=True))
    each = heard.view(ranks, -1, 1) & _BITS_OF_BYTE
    some: list[bool] = each.amax(0).view(-1)[-num_bits:].bool().tolist()
    return some[: len(has)], some[len(has) :]


_AS_DIGITS = bytes.maketrans(b"\0\1", b"01")
_BITS_OF_BYTE = torch.tensor([1 << bit for bit in reversed(range(8))], dtype=torch.uint8, device="cpu")


_made_groups: weakref.WeakKeyDictionary[ProcessGroup, dict[tuple[str, tuple[int, ...]], ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
"""Of each default process group, by what they are for and their ranks."""


def host_group(process_group: ProcessGroup | None = None) -> ProcessGroup | None:
    """A group of the same ranks that communicates in the host's memory, and carries our agreements alone.

    Collective where one has to be made: once for the same ranks in a job. What it carries does not wait for an
    accelerator, and never meets a collective of the engine's: gloo ends a process whose peer sent another size.

    Args:
        process_group: The ranks; the default group when None.
    """
    return _group_for("agreements", process_group)


def background_group(process_group: ProcessGroup | None = None) -> ProcessGroup | None:
    """Another group of the same ranks over the host, for what they do in a thread beside the training.

    Collective where one has to be made, as ``host_group``. Its time-out is the user's: that of the default group.
    """
    return _group_for("background", process_group)


def group_of_ranks(ranks: Sequence[int]) -> ProcessGroup:
    """A process group of these ranks, in rising order, as the default group communicates.

    Collective of these ranks where it has to be made: once in a job.
    """
    world = dist.group.WORLD
    assert world is not None
    made = _made_groups.setdefault(world, {})
    key = "work", tuple(sorted(ranks))
    if key not in made:
        made[key] = _new_group(*key, None, None)
    return made[key]


def _new_group(use: str, ranks: Sequence[int], timeout: timedelta | None, backend: str | None) -> ProcessGroup:
    """A group of these ranks, under a name of ours. Collective of them alone; of all ranks, torch's own call for all.

    torch would call a group of some ranks by how many groups each of them is in, and wait for good where they are in
    different numbers. What the group is for says as much, is the same on each, and is there once in a job. Nor may it
    be split off the communicator of all, which NCCL would have all of them do (torch does, where a device is bound).
    """
    if len(ranks) == dist.get_world_size():
        return dist.new_group(list(ranks), timeout, backend)
    check("process groups")
    digest = hashlib.sha1(repr(tuple(ranks)).encode(), usedforsecurity=False).hexdigest()
    name = f"dist_optim_{use}_{digest}"
    with mock.patch.multiple(
        dist.distributed_c10d, _hash_ranks_to_str=lambda _: name, _get_split_source=lambda _: None
    ):
        return dist.new_group(list(ranks), timeout, backend, use_local_synchronization=True)


def _group_for(use: str, process_group: ProcessGroup | None) -> ProcessGroup | None:
    world = dist.group.WORLD if num_ranks(process_group) > 1 else None
    if world is None or dist.get_backend(process_group) == "fake":  # torch's stand-in for ranks that are not there
        return process_group
    ranks = tuple(dist.get_process_group_ranks(process_group or world))
    made = _made_groups.setdefault(world, {})
    if (use, ranks) not in made:
        timeout = _timeout_of(world) if use == "background" else None
        made[use, ranks] = _new_group(use, ranks, timeout, "gloo")
    return made[use, ranks]


def _timeout_of(process_group: ProcessGroup) -> timedelta | None:
    """How long its collectives may take; None where it does not say so."""
    backend: Any = process_group._get_backend(process_group._device_types[0])
    return getattr(getattr(backend, "options", None), "_timeout", None)
