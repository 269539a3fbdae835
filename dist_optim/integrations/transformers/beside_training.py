"""The Trainer's checkpoints, written while it trains on: ``TrainingArguments(asynchronous_saves=True)``.

A call of ``_save_checkpoint`` makes the folder aside. Into it transformers writes what is small (configuration,
tokenizer, progress, generators, schedule, adapters); weights and the optimizer's state are copied to the host. A thread
then writes those, seals the folder, gives it its name, and removes older ones. Only then there is a checkpoint, and the
callbacks' ``on_save`` follows, with the state of that moment: before the next save, or at the end of training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from dist_optim.checkpoint import wait_for_saves
from dist_optim.checkpoint.directory import attempt
from dist_optim.errors import UnsupportedError
from dist_optim.ranks.together import together

__all__ = [
    "Announcement",
    "DeferredWrites",
    "is_deferrable",
    "on_save_kept_back",
    "refuse_unserved_saves",
    "settle_saves",
    "writer_of_weights",
]


@dataclass(frozen=True, slots=True)
class DeferredWrites:
    """What of a checkpoint is not written when the call returns: actions on copies."""

    alone: list[Callable[[], None]] = field(default_factory=list)
    """By this rank."""
    together: list[Callable[[dist.ProcessGroup | None], None]] = field(default_factory=list)
    """By all ranks, in the same order on each."""

    def write(self, directory: Path, ranks: dist.ProcessGroup | None) -> None:
        """Collective over a group that nothing else uses meanwhile."""
        attempt(lambda: [action() for action in self.alone], directory, ranks)
        for action in self.together:
            action(ranks)


@dataclass(frozen=True, slots=True)
class Announcement:
    """A save that the callbacks' ``on_save`` does not know of yet."""

    folder: Path
    arguments: Any
    state: Any
    """The Trainer's, as it was saved."""


@contextmanager
def on_save_kept_back(trainer: Any) -> Iterator[None]:
    """The callbacks' ``on_save`` follows when the folder is whole (``settle_saves``)."""
    handler = trainer.callback_handler

    def on_save(arguments: Any, state: Any, control: Any) -> Any:
        then = copy.copy(state)
        then.log_history = list(state.log_history)  # goes on growing
        trainer._announcement = Announcement(trainer._saved_into, arguments, then)
        control.should_save = False  # as the handler's own does
        return control

    handler.on_save = on_save
    try:
        yield
    finally:
        del handler.on_save


def settle_saves(trainer: Any) -> None:
    """Wait until the last save is on the disk, and tell the callbacks. Collective.

    Raises:
        BackgroundSaveError: On all ranks: it failed. They are not told of it.
    """
    kept, trainer._announcement = trainer._announcement, None
    wait_for_saves()
    if kept is not None:
        handler = trainer.callback_handler
        # its class's: its own may be kept back, for the next save
        trainer.control = type(handler).on_save(handler, kept.arguments, kept.state, trainer.control)
        trainer._seal_again(kept.folder)


def is_deferrable(trainer: Any, state_dict: Mapping[str, Any] | None) -> bool:
    """Whether transformers writes these weights as they are given, and not what the model holds by then.

    Adapters and quantized weights it takes from the model itself, and what it has sharded it gathers.
    """
    model = trainer.model
    has_own_way = hasattr(model, "peft_config") or getattr(model, "hf_quantizer", None) is not None
    is_gathered = getattr(trainer, "is_distributed_loading_by_transformers", False)
    is_sharded = any(isinstance(one, DTensor) for one in (state_dict or dict(model.named_parameters())).values())
    return not has_own_way and not is_gathered and not is_sharded and state_dict != {}


def writer_of_weights(trainer: Any, state_dict: Mapping[str, Any] | None, folder: Path) -> Callable[[], None]:
    """A copy of the weights; what is returned writes them as the Trainer does, and nothing else of a checkpoint."""
    copied = on_host(trainer.model.state_dict() if state_dict is None else state_dict)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if isinstance(model, PreTrainedModel):
        return lambda: model.save_pretrained(folder, state_dict=copied)
    return lambda: save_file(copied, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def on_host(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same, copied; tensors that were one are one."""
    copies: dict[Any, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return {name: copied(value) for name, value in state_dict.items()}


def refuse_unserved_saves(trainer: Any) -> None:
    """Before the first step. Collective.

    Raises:
        UnsupportedError: On all ranks: a checkpoint of this run cannot be written beside the training.
    """

    def check() -> None:
        for reason in _reasons(trainer):
            raise UnsupportedError(f"asynchronous_saves=True: {reason}")

    together(check, doing="Checking the Trainer's arguments", remedy="Leave asynchronous_saves out.")


def _reasons(trainer: Any) -> list[str]:
    found = []
    if trainer.args.push_to_hub:
        found.append(
            "with push_to_hub transformers uploads a checkpoint as soon as the call has returned, when it is not yet "
            "whole. Leave one of the two out, or upload when training has ended: trainer.push_to_hub()."
        )
    if getattr(trainer.args, "enable_jit_checkpoint", False):
        found.append(
            "with enable_jit_checkpoint a job that is told to end has a moment left for a save, and goes on for none. "
            "Leave one of the two out."
        )
    if not trainer._saves_logically():
        found.append(
            "this run's checkpoints are written by transformers, or by DeepSpeed's engine, itself, from what the "
            "optimizer holds at that moment: it is not dist_optim's, or the engine saves what add_adapter made. "
            "Leave it out."
        )
    return found
