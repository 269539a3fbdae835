"""One save of all ranks beside the training, in a thread; what it failed with is told to all ranks at a later call.

At most one runs at a time. It has a process group of its own, so that none of its collectives meets one of the
training's. Where it fails on one rank, that rank has an error when its thread ends, and the others may have none, or
not yet: so it is told where all ranks meet, before a step (``look_together``) or in ``wait_together``, and once.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing.util
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dist_optim.errors import BackgroundSaveError
from dist_optim.ranks.agreement import agree_on_bits, background_group, host_group, num_ranks
from dist_optim.ranks.meeting import left_behind, meet, waited_for
from dist_optim.ranks.together import raise_together

__all__ = ["in_background", "look_together", "untold", "wait_for_all", "wait_here", "wait_together"]

LOOK_S = 0.1
"""A main thread that waits comes back to the interpreter so often: an error of the watch reaches it there."""


@dataclass(slots=True)
class _Save:
    ranks: dist.ProcessGroup | None
    process: int = field(default_factory=os.getpid)
    """A fork inherits what is said here, and has no such thread."""
    thread: threading.Thread | None = None
    failure: BackgroundSaveError | None = None
    is_settled: bool = False
    """Whether all ranks know how it has ended: the same on each."""


_saves: dict[tuple[int, ...], _Save] = {}
"""The last one of each set of ranks, the latest at the end."""
_hooked_process: int | None = None
_failed_process: int | None = None
"""The one whose last save has failed, when nobody was left to be told."""
EXIT_CODE = 1


def in_background(
    action: Callable[[dist.ProcessGroup | None], None],
    ranks: dist.ProcessGroup | None,
    failed: Callable[[BaseException], BackgroundSaveError],
) -> None:
    """Start the save of these ranks, and return. Collective; none may be running: call ``wait_together`` before.

    The process does not end, nor its default process group, before it has ended; where it has failed, and no call was
    left to raise that, the process says so and ends with exit code 1.

    Args:
        action: Called in a thread on every rank, with a group of the same ranks; it must keep off all other groups.
        ranks: Who takes part; the default group when None.
        failed: What is to be told of an exception that it ended with.
    """
    _install_hooks()
    group, device = background_group(ranks), torch.cuda.current_device() if torch.cuda.is_initialized() else None
    own = _Save(ranks)

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins on the first one
            action(group)
        except BaseException as error:  # whatever it is, nothing was done
            own.failure = failed(error)

    own.thread = threading.Thread(target=run, name="dist_optim-background")
    _saves.pop(_numbers(ranks), None)
    _saves[_numbers(ranks)] = own
    own.thread.start()


def wait_together(ranks: dist.ProcessGroup | None) -> None:
    """Wait until the save has ended on all ranks. Collective, also where there is none.

    Raises:
        BackgroundSaveError: On all ranks: it failed on one, and that was not told yet.
    """
    wait_here()
    _raise_untold(ranks)


def wait_for_all(call: str) -> None:
    """As ``wait_together``, for each set of ranks that has saved, with a place to meet; nothing where none has."""
    for save in list(_saves.values()):
        if save.process == os.getpid():
            meet(call, save.ranks)
            wait_together(save.ranks)


def wait_here() -> None:
    """Wait until the save has ended on this rank. Not a collective; its own collectives have their time-outs."""
    for save in list(_saves.values()):
        while save.process == os.getpid() and save.thread is not None and save.thread.is_alive():
            save.thread.join(LOOK_S)


def look_together(call: str, ranks: dist.ProcessGroup | None) -> None:
    """Before a step: raise what the save of these ranks has failed with. Collective, and waits for no save.

    It is one small agreement while a save runs, and nothing at all when all ranks know how the last one has ended.

    Raises:
        BackgroundSaveError: On all ranks. The same call may be made again.
    """
    own = _unsettled(ranks)
    if own is None or left_behind(ranks):  # the step itself says so
        return
    runs = own.thread is not None and own.thread.is_alive()  # before the failure is read
    has_failed = own.failure is not None
    if num_ranks(ranks) > 1:
        bits, _ = agree_on_bits(
            [has_failed, runs], [False, False], host_group(ranks), lambda work: waited_for(work, call, ranks)
        )
        has_failed, runs = bits
    if has_failed:
        _raise_untold(ranks)
    own.is_settled = not runs


def untold(ranks: dist.ProcessGroup | None = None) -> BackgroundSaveError | None:
    """What their save has failed with on this rank, unless all ranks were told. Local, and does not wait."""
    own = _unsettled(ranks)
    return None if own is None else own.failure


def _raise_untold(ranks: dist.ProcessGroup | None) -> None:
    try:
        raise_together(untold(ranks), ranks)
    except BackgroundSaveError:
        if (own := _unsettled(ranks)) is not None:
            own.is_settled = True  # also where its thread has not come so far
        raise


def _unsettled(ranks: dist.ProcessGroup | None) -> _Save | None:
    own = _saves.get(_numbers(ranks)) if _saves else None
    return None if own is None or own.is_settled or own.process != os.getpid() else own


def _numbers(ranks: dist.ProcessGroup | None) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(ranks or dist.group.WORLD)) if num_ranks(ranks) > 1 else ()


def _install_hooks() -> None:
    """Once a process: the default process group, and the interpreter, end after the save."""
    global _hooked_process
    if _hooked_process == os.getpid():
        return
    _hooked_process = os.getpid()
    destroy = dist.distributed_c10d.destroy_process_group

    @functools.wraps(destroy)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        if group is None or group is dist.group.WORLD or group in [save.ranks for save in _saves.values()]:
            _end()
        destroy(group)

    dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = destroy_process_group
    # A process that multiprocessing started runs its finalizers at its end, and not atexit's.
    atexit.register(_end)
    multiprocessing.util.Finalize(None, _end_of_child, exitpriority=200)


def _end() -> None:
    """Wait, and say what nobody was told."""
    global _failed_process
    wait_here()
    for save in _saves.values():
        if save.failure is not None and not save.is_settled and save.process == os.getpid():
            print(f"dist_optim: {save.failure}", file=sys.stderr, flush=True)
            _failed_process = os.getpid()
    _saves.clear()


def _end_of_child() -> None:
    _end()
    if _failed_process == os.getpid():
        sys.exit(EXIT_CODE)


@atexit.register  # when this is imported, before most others are, and so called after them
def _exit_as_failed() -> None:
    """A job whose last checkpoint is not there has not succeeded; Python has no other way to say so by now."""
    if _failed_process == os.getpid():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)
