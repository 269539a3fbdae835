"""Calls that every rank has to make: a rank that makes one alone is told so within seconds, and does not hang.

What is local with a stock optimizer can be collective here (a save, a swap of weights, a norm). Ranks count their
calls, and before its collectives each notes the call on the job's store. All there: it goes on. Otherwise it waits,
and looks every so often at what the missing ranks say of themselves: a rank that works may still come, however long
that takes. One that is at another call, waits in another collective, or has left will not: then who waits raises.

It costs two operations of the store a rank and call, and nothing inside a step: there ranks meet in the collective
that begins it (``waited_for``), and use the store only where that takes long. Where ranks do not watch each other
(``rank_timeout_s=0``, or a kind of store that is not known) there is no meeting.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from dist_optim.errors import RanksDisagreeError
from dist_optim.ranks.agreement import num_ranks
from dist_optim.ranks.board import Board
from dist_optim.ranks.watch import Watch
from dist_optim.ranks.whereabouts import Call, Whereabouts, standing_at

__all__ = ["MeetingPlace", "are_watched", "left_behind", "meet", "open_place", "waited_for"]

PATIENCE_S = 2.0
"""Between two looks at the others."""
LOOKS_A_SECOND = 64
"""Of all ranks together: of many ranks that wait for one, each looks less often."""

_places: list[MeetingPlace] = []
_left_behind: dict[tuple[int, ...], str] = {}
"""By the ranks, the call whose collective was posted here and refused."""


class MeetingPlace:
    """Where the calls of ranks that watch each other are noted.

    Args:
        board: Its own client of the store; each rank has said where it is.
        watch: What asks the others where they are.
        world: The default process group; the place is closed with it.
    """

    def __init__(self, board: Board, watch: Watch, world: dist.ProcessGroup) -> None:
        self._board, self._watch, self._world = board, watch, weakref.ref(world)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._last_keys: dict[tuple[int, ...], str] = {}

    @property
    def is_open(self) -> bool:
        """Whether its process group is still there, and watched."""
        return self._watch.is_on and dist.is_initialized() and self._world() is dist.group.WORLD

    def serves(self, ranks: tuple[int, ...]) -> bool:
        """Whether these ranks can meet here."""
        return self._watch.ranks.issuperset(ranks)

    def meet(self, name: str, ranks: tuple[int, ...]) -> None:
        """Return when all these ranks are at this call."""
        call = Call(name, ranks, self._numbers.get(ranks, 0))
        key = f"{zlib.crc32(repr(ranks).encode())}/{call.number}/{name}"
        if self._board.arrive(key, len(ranks)):
            if before := self._last_keys.get(ranks):
                self._board.forget(before)  # all have left it, since all are here
        else:
            with standing_at(call):
                self._wait(call, key)
        self._numbers[ranks], self._last_keys[ranks] = call.number + 1, key

    def _wait(self, call: Call, key: str) -> None:
        try:
            for patience_s in self.patience(call.ranks):
                if self._board.all_arrived(key, patience_s):
                    return
                self.look_for_others(call)
        except RanksDisagreeError:
            if self._board.all_arrived(key, 0.0):  # the last one came during the look, and is at its next call already
                return
            self._board.depart(key)
            raise

    def patience(self, ranks: tuple[int, ...]) -> Iterator[float]:
        """Times between looks at the others, without an end."""
        yield PATIENCE_S + ranks.index(dist.get_rank()) / LOOKS_A_SECOND
        while True:
            yield max(PATIENCE_S, len(ranks) / LOOKS_A_SECOND)

    def look_for_others(self, call: Call) -> None:
        """Return while a missing rank may still come.

        Raises:
            RanksDisagreeError: None will.
        """
        question, own = self._watch.ask_where(), dist.get_rank()
        if not question:
            return
        missing: list[str] = []
        for rank, text in zip(call.ranks, self._board.where_are(call.ranks), strict=True):
            found = Whereabouts.from_text(text)
            if rank == own or (found.answers >= question and found.call == call):
                continue
            why = _why_not(found, own, call) if found.answers >= question else ""
            if not why:
                return
            missing.append(f"rank {rank} {why}")
        if missing:
            raise RanksDisagreeError(
                f"{call.name} needs all ranks, and was called on rank {own} while {' and '.join(missing)}. Call it on "
                "every rank, in the same order: not inside `if rank == 0:`, nor in one rank's `except`."
            )


def _why_not(found: Whereabouts, own: int, call: Call) -> str:
    """Why a rank will not come to this call; empty while it may."""
    if found.call is not None:
        if found.call.ranks == call.ranks and found.call.number < call.number:
            return ""  # where it was before: all have come through that number
        return f"is at {found.call.name}" if own in found.call.ranks else ""
    return f"waits in {found.waits_in}" if found.waits_in else ""


def open_place(board: Board, watch: Watch, world: dist.ProcessGroup) -> None:
    """From now on the watched ranks meet there, until their process group ends."""
    if not any(place.is_open for place in _places):
        _left_behind.clear()  # another process group
    _places[:] = [MeetingPlace(board, watch, world), *(place for place in _places if place.is_open)]


def meet(call: str, process_group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank of the group makes this call. Collective; each rank for itself, in the order of its calls.

    Args:
        call: As the user knows it, "save_checkpoint()".
        process_group: The ranks that have to; the default group when None.

    Raises:
        RanksDisagreeError: Some ranks will not come. On the ranks that wait, within seconds; nothing was done yet.
    """
    if num_ranks(process_group) > 1:
        ranks = _ranks_of(process_group)
        place = _place_for(ranks)
        if place is not None:
            place.meet(call, ranks)


def are_watched(process_group: dist.ProcessGroup | None = None) -> bool:
    """Whether these ranks can ``meet``; the same answer on each."""
    return _place_for(_ranks_of(process_group)) is not None


def waited_for(work: dist.Work, call: str, process_group: dist.ProcessGroup | None = None) -> None:
    """Wait for the collective in which all ranks of the group make this call, and look for those who stay away.

    Raises:
        RanksDisagreeError: As ``meet``.
    """
    ranks = _ranks_of(process_group)
    place = _place_for(ranks)
    if place is None:
        work.wait()
        return
    step = Call(call, ranks, -1)
    for patience_s in place.patience(ranks):
        if _ends_within(work, patience_s):
            return
        with standing_at(step):
            if _ends_within(work, PATIENCE_S):
                return
            try:
                place.look_for_others(step)
            except RanksDisagreeError:
                _left_behind[ranks] = call
                raise


def left_behind(process_group: dist.ProcessGroup | None = None) -> str:
    """Why these ranks cannot meet in a step any more: this one left a collective behind, which the others' next would
    meet in place of its own. Empty where it is not so. Local."""
    call = _left_behind.get(_ranks_of(process_group)) if _left_behind else None
    if call is None:
        return ""
    return (
        f"{call} was called on rank {dist.get_rank()} alone, was refused, and still waits for the other ranks: their "
        "next step would meet it in place of this one. Call it on every rank, let the refusal end the job, and resume "
        "from the last checkpoint"
    )


def _ends_within(work: dist.Work, timeout_s: float) -> bool:
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


def _place_for(ranks: tuple[int, ...]) -> MeetingPlace | None:
    return next((place for place in _places if place.is_open and place.serves(ranks)), None)


def _ranks_of(process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
