"""Checkpoints on logical names: what they hold does not know the sharding.

Reading order: ``directory`` (a folder appears whole or not at all), ``index`` (what tensors a folder holds, and whether
they are whole), ``blocks`` (blocks of logical tensors, written and read by ``torch.distributed.checkpoint``),
``group_values``, ``optimizer_state``, ``exported`` (the weights to export), ``run_state`` (model, optimizer and
schedule together), ``torch_state_dict`` (torch's own functions, asked about optimizers of ours).
"""

from dist_optim.checkpoint.exported import exported_weights
from dist_optim.checkpoint.optimizer_state import load_optimizer, save_optimizer
from dist_optim.checkpoint.run_state import load_checkpoint, save_checkpoint
from dist_optim.checkpoint.torch_state_dict import answer_torch

__all__ = ["exported_weights", "load_checkpoint", "load_optimizer", "save_checkpoint", "save_optimizer"]

answer_torch()
