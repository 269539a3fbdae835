"""What accelerate alone would do otherwise than the Trainer asks, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.environment import is_switched_on
from dist_optim.ranks.agreement import num_ranks

__all__ = [
    "equal_start",
    "fsdp_plugin",
    "prepare_deepspeed",
    "settle_fsdp_settings",
]


def prepare_deepspeed(arguments: Any) -> None:
    """Before the Trainer's arguments set DeepSpeed up on the CPU: gloo alone, without C++ that takes a minute to build.

    Raises:
        UnsupportedError: There is an accelerator, and DeepSpeed would use it.
    """
    asked = arguments.deepspeed or is_switched_on("ACCELERATE_USE_DEEPSPEED")
    if asked and (arguments.use_cpu or not torch.accelerator.is_available()):
        arguments.use_cpu = True  # or accelerate takes every rank for a job of its own
        cpu_rehearsal.deepspeed_arguments()


def settle_fsdp_settings(arguments: Any) -> None:
    """Take out of the arguments' FSDP settings what accelerate can only do on an accelerator: `equal_start` does it."""
    if arguments.fsdp_plugin_args is not None and arguments.device.type == "cpu":
        arguments.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
        if "sync_module_states" in arguments.fsdp_plugin_args:
            arguments.fsdp_plugin_args["sync_module_states"] = False


def fsdp_plugin(settings: dict[str, Any] | None) -> Any:
    """The plugin that the Trainer's arguments describe, which accelerate has dropped; None without such arguments."""
    if settings is None:
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(**settings)


def equal_start(model: nn.Module) -> None:
    """Every rank starts from the weights of rank 0, as FSDP1's ``sync_module_states`` has it. Collective.

    Of what tensor parallelism has cut, rank 0 has one part, and each rank keeps its own.
    """
    if num_ranks() > 1:
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if not isinstance(tensor, DTensor):
                    dist.broadcast(tensor.data, src=0)
