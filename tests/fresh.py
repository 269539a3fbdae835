"""Process-wide state of the libraries, given back: the ranks of a pool run one body after another in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
