"""An estimate of what a forward pass keeps for backward: the model's own, run on tensors without storage.

What autograd saves is counted, each storage once; weights are not. An attention kernel of a GPU may save a little more
or less than the CPU's, which is what is run here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_optim.planning.model import PlannedModel, build_from, with_layers

__all__ = ["activation_bytes"]

FEW, MORE = 2, 4
"""Layers of the models that are run: each further layer takes as much as one of these."""


def activation_bytes(
    model: PlannedModel, batch: int, length: int, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> int | None:
    """Bytes that one forward pass of so many sequences keeps, by estimate; 0 where none are asked for.

    Args:
        model: Built from a config; of others nobody knows the inputs.
        batch: Sequences.
        length: Tokens of each.
        dtype: Of the products.
        gradient_checkpointing: Keep the input of each layer, and one layer's own while it is computed again.

    Returns:
        None where the class of model cannot be run so.
    """
    if not batch or not length:
        return 0
    asked = ("activations", batch, length, dtype, gradient_checkpointing)
    if asked not in model.known:
        model.known[asked] = _estimate(model, batch, length, dtype, gradient_checkpointing)
    found: int | None = model.known[asked]
    return found


def _estimate(
    model: PlannedModel, batch: int, length: int, dtype: torch.dtype, gradient_checkpointing: bool
) -> int | None:
    few, more = with_layers(model, FEW), with_layers(model, MORE)
    if few is None:
        return None
    try:
        saved = [_saved(config, batch, length, dtype) for config in (few, more)]
    except Exception:  # a model's own code, on tensors without values: any
        return None
    layer = (saved[1] - saved[0]) // (MORE - FEW)
    layers = model.config.num_hidden_layers
    around = saved[0] - FEW * layer
    if not gradient_checkpointing:
        return around + layers * layer
    hidden = batch * length * getattr(model.config, "hidden_size", 0) * dtype.itemsize
    return around + layers * hidden + layer


def _saved(config: Any, batch: int, length: int, dtype: torch.dtype) -> int:
    kept: dict[int, tuple[Tensor, int]] = {}
    own: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build_from(config, dtype=dtype).train()
        own |= {one.untyped_storage()._cdata for one in (*module.parameters(), *module.buffers())}
        tokens = torch.zeros((batch, length), dtype=torch.int64, device="cpu")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = module(input_ids=tokens, labels=tokens, use_cache=False).loss
        del loss
    return sum(nbytes for _, nbytes in kept.values())
