"""Checkpoints on logical names: what they hold does not know the sharding.

Reading order: ``directory`` (a folder appears whole or not at all), ``identity`` (what binds the parts of one save),
``schema`` (what a record may hold), ``index`` (what tensors a folder holds), ``seals`` (whether they are those that
were saved), ``blocks`` (blocks of logical tensors, written and read by ``torch.distributed.checkpoint``),
``group_values``, ``build_values`` (hyperparameters of the build, compared), ``fitting`` (whether what was read can be
installed), ``beside_training`` (asynchronous saves), ``optimizer_content``, ``optimizer_state``, ``exported`` (the
weights to export), ``run_content``, ``run_state`` (model, optimizer and schedule together), ``torch_state_dict``
(torch's own functions, asked about optimizers of ours), ``plain_loads`` (loads of other packages, without running
anything), ``in_and_out`` (what others wrote, and what they load).
"""

from dist_optim.checkpoint.beside_training import wait_for_saves
from dist_optim.checkpoint.exported import exported_weights
from dist_optim.checkpoint.in_and_out.export import export
from dist_optim.checkpoint.in_and_out.imports import import_
from dist_optim.checkpoint.in_and_out.inspection import inspect
from dist_optim.checkpoint.optimizer_state import load_optimizer, save_optimizer
from dist_optim.checkpoint.run_state import load_checkpoint, save_checkpoint
from dist_optim.checkpoint.torch_state_dict import answer_torch

__all__ = [
    "export",
    "exported_weights",
    "import_",
    "inspect",
    "load_checkpoint",
    "load_optimizer",
    "save_checkpoint",
    "save_optimizer",
    "wait_for_saves",
]

answer_torch()
