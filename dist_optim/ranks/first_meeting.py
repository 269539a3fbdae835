"""The first calls that all ranks make, when they do not watch each other yet: who waits for whom is said, on the store.

Whether a rank that is missing still comes cannot be known then: it may load a model for minutes. So the rank that waits
longest says after some seconds who has not called, and all wait on, for as long as the process group lets them.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from dist_optim.errors import RanksDisagreeError
from dist_optim.ranks.agreement import num_ranks
from dist_optim.ranks.meeting import are_watched, meet
from dist_optim.ranks.store_polling import is_set_within

__all__ = ["meet_first"]

SAID_AFTER_S = 5.0
REMEDY = "It needs all ranks: call it on every rank, not inside `if rank == 0:`"

_numbers: Counter[tuple[int, ...]] = Counter()


def meet_first(call: str, process_group: dist.ProcessGroup | None = None) -> None:
    """As ``meeting.meet``, also before ranks watch each other. Collective, and before any other collective of a call.

    Raises:
        RanksDisagreeError: As ``meet``. Before ranks watch each other, only after the process group's own timeout.
    """
    if num_ranks(process_group) == 1:
        return
    if are_watched(process_group):
        meet(call, process_group)
        return
    store = dist.distributed_c10d._get_default_store()
    if not _is_known(store):
        return
    ranks = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
    _numbers[ranks] += 1
    key = f"dist_optim/{zlib.crc32(repr(ranks).encode())}"
    _Place(store, f"{key}/{_numbers[ranks]}", ranks).wait(call)


def _is_known(store: dist.Store) -> bool:
    """Whether it is a kind that jobs use; stand-ins for ranks that are not there have others."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return isinstance(store, (dist.TCPStore, dist.FileStore))


class _Place:
    """One call, on the store."""

    def __init__(self, store: dist.Store, key: str, ranks: Sequence[int]) -> None:
        self._store, self._key, self._ranks = store, key, ranks

    def wait(self, call: str) -> None:
        self._store.set(f"{self._key}/{dist.get_rank()}", "1")
        place = self._store.add(f"{self._key}/count", 1)
        if place == len(self._ranks):
            self._store.set(f"{self._key}/all", "1")
            return
        if place == 1 and not self._is_complete(SAID_AFTER_S) and (missing := self._missing()):
            line = f"rank {dist.get_rank()} waits in {call} for {missing}, where it was not called yet. {REMEDY}."
            print(f"dist_optim: {line}", file=sys.stderr, flush=True)
        timeout_s = getattr(self._store, "timeout").total_seconds()  # noqa: B009  torch's stubs do not know it
        if not self._is_complete(timeout_s):
            raise RanksDisagreeError(
                f"{call} was called on rank {dist.get_rank()}, and within {timeout_s:g} s not on {self._missing()}. "
                f"{REMEDY}."
            )

    def _is_complete(self, within_s: float) -> bool:
        return is_set_within(self._store, f"{self._key}/all", within_s)

    def _missing(self) -> str:
        names = [f"rank {rank}" for rank in self._ranks if not self._store.check([f"{self._key}/{rank}"])]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
