"""Adapters of peft in a checkpoint of the Trainer: whose parameter is which tensor of their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_optim.checkpoint.model_weights import StoredWeights

__all__ = ["is_peft_model", "stored_adapters"]

FILES = ("adapter_model.safetensors", "adapter_model.bin")


def is_peft_model(model: nn.Module) -> bool:
    """Whether it is peft's own; transformers' ``add_adapter`` makes none."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def stored_adapters(checkpoint: str | Path, model: Any) -> StoredWeights | None:
    """Where a checkpoint holds the adapters of this model; None where it holds none, or the model has none.

    peft leaves the adapter's name out of those in its file, and more, by the kind of adapter. What it makes of a
    parameter's name is asked of itself, with an empty tensor for each.
    """
    if not is_peft_model(model):
        return None
    from peft import get_peft_model_state_dict

    files: dict[Path, dict[str, str]] = {}
    for adapter in model.peft_config:
        folder = Path(checkpoint) if adapter == "default" else Path(checkpoint) / adapter
        path = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if path is not None:
            empty = {name: torch.empty(0, device="cpu") for name, _ in model.named_parameters()}
            owners = {id(one): name for name, one in empty.items()}
            stored = get_peft_model_state_dict(model, empty, adapter_name=adapter, save_embedding_layers=False)
            files[path] = {name: owners[id(one)] for name, one in stored.items() if id(one) in owners}
    return StoredWeights(tuple(files), names=files) if files else None
