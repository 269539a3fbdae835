"""Other libraries' bars, and their warnings about what is not used here, silenced: for a script's own output."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["libraries_silenced", "quieten_libraries"]

LOGGERS = ("DeepSpeed", "bitsandbytes", "torch.utils._pytree", "torchao")
CALLED_BY_ENGINES = (
    ".*(all_gather_into|reduce_scatter)_tensor.* is deprecated",
    "FSDP.state_dict_type",
    "Slicing a flattened dim from root mesh",
    r"barrier\(\): using the device under current context",
)
"""What torch has to say of how accelerate and DeepSpeed call it."""
ACCELERATES = "accelerate.accelerator"
FALSE_ALARM = "Gradient accumulation steps mismatch"
"""Of accelerate, where a Trainer accumulates by itself: both numbers are the user's."""


def _is_true(record: logging.LogRecord) -> bool:
    return FALSE_ALARM not in record.getMessage()


def quieten_libraries() -> None:
    """Leave standard output and error to the script; errors still appear. Before the libraries are imported."""
    import transformers

    logging.disable(logging.NOTSET)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of what it finds by itself
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(ACCELERATES).addFilter(_is_true)  # one function counts once
    for text in CALLED_BY_ENGINES:
        warnings.filterwarnings("ignore", message=text)


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """No warnings, neither of Python's nor of loggers, while something is looked at; afterwards as before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
