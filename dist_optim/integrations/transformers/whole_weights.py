"""Whole weights, as any strategy saves them (`model.safetensors`), into a model that FSDP has sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_optim.errors import CheckpointError
from dist_optim.layouts.detect import PlacedParameter, clean_name, detect
from dist_optim.ranks.agreement import own_rank
from dist_optim.ranks.together import together

__all__ = ["install_whole_weights", "whole_weights_in"]

SHARDED = "pytorch_model_fsdp*"
"""accelerate's own format, which only FSDP reads."""


def whole_weights_in(checkpoint: str | Path) -> list[Path]:
    """The files of a checkpoint that holds whole tensors; none where accelerate has saved FSDP's own format."""
    folder = Path(checkpoint)
    return [] if any(folder.glob(SHARDED)) else sorted(folder.glob("model*.safetensors"))


def install_whole_weights(files: list[Path], model: nn.Module) -> None:
    """Each rank takes what it holds of every tensor; one tensor at a time is whole in memory. Collective.

    Raises:
        CheckpointError: On all ranks: a file is damaged, or of another model.
    """
    together(
        lambda: _install(files, model),
        doing=f"Reading the weights in {str(files[0].parent)!r}",
        remedy="They are damaged, or of another model: resume from another checkpoint.",
        otherwise=CheckpointError,
    )


def _install(files: list[Path], model: nn.Module) -> None:
    from safetensors import safe_open

    placed = detect(model)
    takers = _takers(model, placed)
    with torch.no_grad():
        for path in files:
            with safe_open(path, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - it is no mapping
                    if name in takers:
                        takers.pop(name)(stored.get_tensor(name))
    missing = sorted(name for name in takers if name in placed)
    if missing:
        raise KeyError(f"no {missing[0]!r} ({len(missing)} such)")


def _takers(model: nn.Module, placed: Mapping[str, PlacedParameter]) -> dict[str, Callable[[Tensor], object]]:
    """By name, what to do with the whole tensor: keep this rank's part of a parameter, or all of a buffer."""
    takers: dict[str, Callable[[Tensor], object]] = {}
    for name, buffer in model.named_buffers():
        takers[clean_name(model, name)] = buffer.copy_
    for name, one in placed.items():

        def take(full: Tensor, one=one) -> None:  # type: ignore[no-untyped-def]
            if full.shape != one.shape:
                raise ValueError(f"{one.fqn!r} has shape {tuple(full.shape)} in it, {tuple(one.shape)} in the model")
            one.local().copy_(one.layout.view_of(full, own_rank(one.process_group)))

        takers[name] = take
    return takers
