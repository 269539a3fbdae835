"""Process-wide state of the libraries, given back: the ranks of a pool run one body after another in one process.

And ranks that have none of it yet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from unittest import mock

from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def forget() -> None:
    """As in a new process, whatever is still alive.

    transformers makes models under ZeRO-3 as long as a configuration of it lives. bitsandbytes would give overrides of
    parameters that are gone to later ones that have the same id.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager._instance = None


@contextmanager
def own_libraries() -> Iterator[None]:
    """What accelerate, transformers and bitsandbytes keep for the process ends with the context."""
    try:
        yield
    finally:
        forget()


@contextmanager
def own_fork_server() -> Iterator[None]:
    """Ranks of pools that start inside have imported torch alone; others are forks of a process that has more."""
    server = forkserver.ForkServer()
    names = ("connect_to_new_process", "ensure_running", "get_inherited_fds", "set_forkserver_preload")
    with mock.patch.multiple(forkserver, **{name: getattr(server, name) for name in names}):
        yield
