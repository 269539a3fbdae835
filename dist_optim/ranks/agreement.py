"""What ranks agree on before they act: errors raised together, plans compared, gradient presence.

Every function here is a collective of the given process group: all its ranks call it, in the same order. Without an
initialised process group the caller is alone, and each is a local operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import DistOptimError, RanksDisagreeError

__all__ = [
    "agree_on_presence",
    "assert_ranks_equal",
    "gather_objects",
    "num_ranks",
    "own_rank",
    "raise_together",
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


def raise_together(error: DistOptimError | None, process_group: ProcessGroup | None = None) -> None:
    """Raise on every rank when any rank has an error, so that none goes on into a collective alone.

    The rank that has an error raises its own; the others raise the first one, with the rank it came from.
    """
    messages = gather_objects(None if error is None else (type(error), str(error)), process_group)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            error_type, text = message
            raise error_type(f"[from rank {rank}] {text}")


def assert_ranks_equal(
    what: str, items: Sequence[tuple[str, Any]], remedy: str, process_group: ProcessGroup | None = None
) -> None:
    """Compare named values over the ranks.

    Raises:
        RanksDisagreeError: On all ranks, naming the first item that differs, two ranks and both their values.
    """
    listings = gather_objects([(name, repr(value)) for name, value in items], process_group)
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


def agree_on_presence(
    has: Sequence[bool], lacks: Sequence[bool], device: torch.device, process_group: ProcessGroup | None = None
) -> tuple[list[bool], list[bool]]:
    """Which entries any rank has, and which some rank lacks: one small all-reduce.

    Args:
        has: This rank's entries, in the same order on every rank.
        lacks: Entries that this rank should have and has not.
        device: Where the process group communicates.

    Returns:
        ``(any_has, any_lacks)``, each as long as ``has``.
    """
    if num_ranks(process_group) == 1:
        return list(has), list(lacks)
    bits: Tensor = torch.tensor([has, lacks], dtype=torch.uint8, device=device)
    dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=process_group)
    any_has, any_lacks = bits.bool().tolist()
    return any_has, any_lacks
