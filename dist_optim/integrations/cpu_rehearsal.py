"""FSDP or DeepSpeed asked for on the CPU is what is done: a rehearsal of a GPU job on a machine without GPUs.

accelerate 1.15 reads an FSDP configuration everywhere, and obeys it on accelerators only: on the CPU it drops the
plugin and trains DDP, without a word. ``turn_fsdp_on`` takes the decision that accelerate takes on a GPU: it gives the
shared state the distributed type FSDP, and the plugin with the accelerator's mixed precision. All that follows
(wrapping, clipping, gathering of state dicts) is accelerate's and torch's own code. ``accelerate.prepare`` beside this
file calls it where ``ACCELERATE_USE_FSDP`` is set and the accelerator's device is the CPU; nobody else needs to.

What differs from a GPU:

* The device is ``cpu``, not ``cpu:0``: FSDP1 compares it with torch's own name of the current CPU.
* ``sync_module_states`` must be off: accelerate needs a GPU for it. Ranks start from equal weights by their seed.
* Under FSDP1, the model's ``state_dict`` gathers without offloading, whoever asks. torch's ``offload_to_cpu`` means
  "copy" on a GPU; on the CPU it keeps views of memory that FSDP1 then frees, and the process ends with a segmentation
  fault.
* Under FSDP2, offloaded parameters are not pinned: torch pins memory for accelerators only.
* ``Accelerator`` refuses the launcher's ``parallelism_config`` (HSDP, tensor parallelism) on the CPU, before anyone can
  help. Start it with ``Accelerator(**fsdp_arguments())``, which sets the mesh aside for ``turn_fsdp_on``; without FSDP,
  for ``bring_mesh``.
* The settings are those of the launcher's environment (``FSDP_VERSION`` and its kin). A plugin that a script gives to
  ``Accelerator(fsdp_plugin=...)`` is lost there on the CPU: give it to ``turn_fsdp_on`` as well, before ``prepare``.

DeepSpeed trains on the CPU, but accelerate counts its ranks only where the backend is named to it, and ``cpu=True``
turns DeepSpeed off. ``Accelerator(**deepspeed_arguments())`` does both right.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullStateDictConfig,
    FullyShardedDataParallel,
)

from dist_optim.errors import UnsupportedError
from dist_optim.integrations.environment import is_switched_on

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

__all__ = [
    "assert_fsdp",
    "bring_mesh",
    "choose_cpu_for_deepspeed",
    "deepspeed_arguments",
    "fsdp_arguments",
    "is_ignored",
    "is_mesh_set_aside",
    "refuse_wrong_size",
    "turn_fsdp_on",
]


MESH_ASKED = "ACCELERATE_USE_PARALLELISM_CONFIG"
SET_ASIDE = "rehearsed"


def fsdp_arguments() -> dict[str, Any]:
    """Keywords for ``Accelerator`` in a rehearsal of FSDP on CPU ranks, with or without a mesh; or of a mesh alone."""
    if is_switched_on(MESH_ASKED):
        os.environ[MESH_ASKED] = SET_ASIDE
    return {"cpu": True}


def is_ignored(accelerator: Accelerator) -> bool:
    """Whether FSDP was asked for and accelerate would train something else, because the device is a CPU."""
    asked = is_switched_on("ACCELERATE_USE_FSDP")
    return asked and accelerator.device.type == "cpu" and accelerator.distributed_type.value != "FSDP"


def is_mesh_set_aside(accelerator: Accelerator) -> bool:
    """Whether ``fsdp_arguments`` has set a mesh aside that nobody has brought yet."""
    return os.environ.get(MESH_ASKED) == SET_ASIDE and accelerator.parallelism_config is None


def turn_fsdp_on(
    accelerator: Accelerator,
    plugin: FullyShardedDataParallelPlugin | None = None,
    parallelism_config: ParallelismConfig | None = None,
) -> None:
    """Make accelerate train FSDP on the CPU ranks of this job, as its configuration asks.

    Lasts as long as accelerate's shared state and this accelerator; nothing else is changed.

    Args:
        accelerator: On the CPU, with a process group, before the model is prepared.
        plugin: The settings; read from the launcher's environment when None.
        parallelism_config: Sizes of a replicate x shard x tp mesh; when None, those that ``fsdp_arguments`` has set
            aside, if any.

    Raises:
        UnsupportedError: There is no process group, a GPU would take the model, or the settings are not known.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type is not DistributedType.MULTI_CPU:
        raise UnsupportedError(
            "FSDP was asked for (ACCELERATE_USE_FSDP is set), but accelerate runs one process on the CPU here. Start "
            "ranks with: accelerate launch --config_file configs/accelerate/fsdp2_cpu_2.yaml SCRIPT, and pass cpu=True "
            "to Accelerator; or remove FSDP from the accelerate configuration."
        )
    if torch.accelerator.is_available():
        raise UnsupportedError(
            "FSDP was asked for on the CPU of a machine with an accelerator, which FSDP2 would use. Hide it (NVIDIA's: "
            "CUDA_VISIBLE_DEVICES=''), or train on it (without cpu=True)."
        )
    if plugin is None and "FSDP_VERSION" not in os.environ:
        raise UnsupportedError(
            "FSDP was asked for by Accelerator(fsdp_plugin=...), which accelerate drops on the CPU. Call "
            "dist_optim.integrations.cpu_rehearsal.turn_fsdp_on(accelerator, fsdp_plugin) before prepare, or give the "
            "settings to accelerate launch: --config_file configs/accelerate/fsdp2_cpu_2.yaml."
        )
    plugin = plugin or FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    state = accelerator.state
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.device = PartialState._shared_state["device"] = torch.device("cpu")
    if parallelism_config is not None or is_mesh_set_aside(accelerator):
        bring_mesh(accelerator, parallelism_config)
    if plugin.fsdp_version == 1:
        vars(accelerator)["prepare_model"] = _gathering_in_place(accelerator.prepare_model)


def bring_mesh(accelerator: Accelerator, sizes: ParallelismConfig | None = None) -> None:
    """Give accelerate on the CPU the mesh that it takes on an accelerator alone. Collective.

    ``turn_fsdp_on`` does so with FSDP; this is for tensor parallelism without.

    Args:
        accelerator: On the CPU, with a process group.
        sizes: When None, those that ``fsdp_arguments`` has set aside.

    Raises:
        UnsupportedError: The sizes do not multiply to the number of ranks.
    """
    from accelerate.utils import ParallelismConfig

    sizes = sizes or ParallelismConfig()
    refuse_wrong_size(sizes, accelerator.num_processes)
    accelerator.state.parallelism_config = sizes
    accelerator.state.device_mesh = sizes.get_device_mesh("cpu")


def refuse_wrong_size(sizes: ParallelismConfig, num_ranks: int) -> None:
    """As accelerate does where it takes the sizes itself.

    Raises:
        UnsupportedError: The mesh has another number of ranks than the job.
    """
    if sizes.total_size != num_ranks:
        raise UnsupportedError(
            f"parallelism_config asks for {sizes.total_size} ranks ({sizes.dp_replicate_size} x "
            f"{sizes.dp_shard_size} x {sizes.tp_size}), and {num_ranks} were started. Make dp_replicate_size x "
            "dp_shard_size x tp_size equal to num_processes."
        )


def deepspeed_arguments() -> dict[str, Any]:
    """Keywords for ``Accelerator`` in a rehearsal of DeepSpeed on CPU ranks; call it before DeepSpeed is imported.

    Raises:
        UnsupportedError: DeepSpeed has already chosen an accelerator.
    """
    from accelerate.utils import InitProcessGroupKwargs

    choose_cpu_for_deepspeed()
    return {"cpu": False, "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}


def choose_cpu_for_deepspeed() -> None:
    """Make DeepSpeed run on the CPU and over gloo alone; call it before DeepSpeed is imported.

    DeepSpeed's own C++ all-reduce, which takes a compiler and a minute at the first start, is left out.

    Raises:
        UnsupportedError: DeepSpeed has already chosen an accelerator, or this machine has one.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu" or torch.accelerator.is_available():
        raise UnsupportedError(
            "A rehearsal of DeepSpeed on the CPU was asked for, and this machine has an accelerator, which accelerate "
            "would use. Hide it (NVIDIA's: CUDA_VISIBLE_DEVICES=''), or train on it."
        )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _gathering_in_place(prepare_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``Accelerator.prepare_model``; ``state_dict`` of what it places gathers without offloading, whatever is asked."""

    @functools.wraps(prepare_model)
    def place(*args: Any, **options: Any) -> nn.Module:
        model = prepare_model(*args, **options)
        if not isinstance(model, FullyShardedDataParallel) or "state_dict" in vars(model):
            return model
        original = model.state_dict

        def state_dict(*args: Any, **options: Any) -> Any:
            for module in FullyShardedDataParallel.fsdp_modules(model):
                if isinstance(module._state_dict_config, FullStateDictConfig):
                    module._state_dict_config.offload_to_cpu = False
            return original(*args, **options)

        vars(model)["state_dict"] = state_dict
        return model

    return place


def assert_fsdp(model: nn.Module) -> None:
    """Fail unless FSDP shards this model: a rehearsal of something else would be worse than none."""
    if not any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise RuntimeError(
            f"FSDP was asked for, but {type(model).__name__} came back from accelerate without it: this version of "
            "accelerate takes the decision elsewhere. dist_optim knows accelerate 1.15."
        )
