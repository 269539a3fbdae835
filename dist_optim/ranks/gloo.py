"""One worker thread for each of gloo's process groups, because two of them corrupt the process's memory.

A gloo group has two threads that run its collectives. When one has ended, its thread writes the collective's name into
a string of the group, without a lock (``lastCompletedWorkName`` in ``ProcessGroupGloo::runLoop``; seen in torch 2.13).
A name of more than 15 characters lies on the heap, so two threads that do it at once free the same memory twice, and
the process dies of SIGSEGV or SIGABRT at that time or much later, somewhere else. ``ALLGATHER_COALESCED`` is such a
name, and the collective behind it is that of ``DTensor.full_tensor``. Waiting for each collective before the next one
does not help: a thread wakes the waiting one before it writes. A thread alone writes in order.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import wraps
from typing import Any

import torch.distributed as dist

__all__ = ["use_one_worker_each"]

_MARK = "has_one_worker"


def use_one_worker_each() -> None:
    """From here on, give every gloo group of this process one worker thread. Call it before the first group is made.

    Collectives of one group then run one after the other, in the order of the calls. Calling it again does nothing.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        return
    group_class: Any = dist.ProcessGroupGloo
    create = group_class.__init__
    if hasattr(create, _MARK):
        return

    @wraps(create)
    def create_with_one_worker(
        group: Any,
        store: dist.Store,
        rank: int,
        size: int,
        options: Any = None,
        *,
        timeout: timedelta | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(options, group_class._Options):  # torch itself gives a time-out, and from 2.14 on a switch
            options = _options(group_class, options if timeout is None else timeout)
        for name, value in others.items():
            setattr(options, name, value)
        options._threads = 1
        create(group, store, rank, size, options)

    setattr(create_with_one_worker, _MARK, True)
    group_class.__init__ = create_with_one_worker


def _options(group_class: Any, timeout: timedelta | None) -> Any:
    """What torch makes of a time-out: a connection for each of the interfaces that the user named, or for one."""
    options = group_class._Options()
    if timeout is not None:
        options._timeout = timeout
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options._devices = [group_class.create_device(interface=name) for name in interfaces]
    options._devices = options._devices or [group_class.create_default_device()]
    return options
