"""Generating while a model is sharded by FSDP1: whole parameters are read, and never written back.

``Seq2SeqTrainer`` generates inside ``summon_full_params``. In there each forward pass frees the whole parameters that
were summoned, and at the end upstream writes back what is in their place: garbage, which is trained on without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

__all__ = ["reading_whole_parameters"]


class _LooksLikeFSDP(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, FullyShardedDataParallel)


class _ReadOnly(metaclass=_LooksLikeFSDP):
    """What Seq2SeqTrainer finds by the name of FSDP1 while it generates."""

    @staticmethod
    def summon_full_params(model: nn.Module) -> AbstractContextManager[None]:
        summoned: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(model, writeback=False)
        return summoned


@contextmanager
def reading_whole_parameters(arguments: Any, model: nn.Module) -> Iterator[None]:
    """Around Seq2SeqTrainer's ``prediction_step``; nothing but for ``predict_with_generate`` under FSDP1."""
    if getattr(arguments, "predict_with_generate", False) and isinstance(model, FullyShardedDataParallel):
        with mock.patch("transformers.trainer_seq2seq.FullyShardedDataParallel", _ReadOnly):
            yield
    else:
        yield
