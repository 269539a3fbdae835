"""Loads of other packages, without running what is in the files.

accelerate, transformers and DeepSpeed read checkpoints of their own inside our doors, and some of their calls take
any pickle (``weights_only=False``; the index of ``torch.distributed.checkpoint``). Inside ``plain_loads`` these calls
make plain values, tensors and the classes that are listed, and refuse all else.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dist_optim.checkpoint.index import IndexReader
from dist_optim.errors import CheckpointError

__all__ = ["plain_loads"]

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def plain_loads(classes: Sequence[type] = ()) -> Iterator[None]:
    """Inside, ``torch.load`` and ``dcp.FileSystemReader`` run no code of a file, whoever calls them. Not a collective.

    Args:
        classes: What may be made besides plain values and tensors.

    Raises:
        CheckpointError: A file names something else, with what.
    """
    environment = {key: value for key, value in os.environ.items() if key != FORBID} | {FORCE: "1"}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(dcp.FileSystemReader, "read_metadata", IndexReader.read_metadata),
        torch.serialization.safe_globals(list(classes)),
    ):
        try:
            yield
        except (pickle.UnpicklingError, CheckpointException) as error:
            raise CheckpointError(_text(error)) from error


def _text(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    named = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"it names ([\w.]+)", str(error))
    if named is None:
        return f"A file of the checkpoint is damaged: {str(error).partition(chr(10))[0]}. Load another checkpoint."
    return (
        f"A file of the checkpoint names {named[1]}, which may be any code, and was not opened. If you trust the "
        f"checkpoint, call torch.serialization.add_safe_globals([...]) with it before loading."
    )
