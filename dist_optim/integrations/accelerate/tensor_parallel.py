"""accelerate: tensor parallelism, which the user has applied to the model before; alone, or with FSDP2 over it.

Under FSDP2 accelerate places what tensor parallelism left alone on its mesh too, by a class that transformers no longer
has (accelerate 1.15 with transformers 5.23: an ImportError). Without FSDP it takes models of transformers alone, and
has nothing to wrap. torch needs no such thing, and neither does an optimizer of ours: the model stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import nn
from torch.distributed.tensor import DTensor

from dist_optim.errors import UnsupportedError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["left_as_it_is", "refuse_unserved"]

BEFORE_PREPARE = (
    'Before prepare, apply torch\'s parallelize_module over accelerator.torch_device_mesh["tp"] (on the CPU, '
    "cpu_rehearsal.bring_mesh or turn_fsdp_on makes that mesh), or load the model by from_pretrained with a tp_plan."
)


@contextlib.contextmanager
def left_as_it_is(accelerator: Accelerator) -> Iterator[None]:
    """While it prepares a model, accelerate adds nothing to the tensor parallelism of it.

    May be entered inside of itself, as one door goes through another.
    """
    changed: dict[str, Any] = {"_prepare_tp": lambda *prepared: prepared}
    if accelerator.distributed_type.value != "FSDP" and _size(accelerator, "tp") > 1:
        changed["prepare_model"] = functools.partial(accelerator.prepare_model, evaluation_mode=True)  # wraps nothing
    with contextlib.ExitStack() as stack:
        for name, ours in changed.items():
            stack.enter_context(mock.patch.object(accelerator, name, ours))
        yield


def refuse_unserved(accelerator: Accelerator, model: nn.Module, remedy: str = BEFORE_PREPARE) -> None:
    """Refuse sizes of ``parallelism_config`` that this model does not have, and that nobody gives it; on this rank.

    Args:
        accelerator: With its strategy settled.
        model: Before accelerate places it.
        remedy: How a model becomes tensor parallel in the door where the message is read.

    Raises:
        UnsupportedError: With what to do.
    """
    strategy, size = accelerator.distributed_type.value, _size(accelerator, "tp")
    if size > 1:
        plugin = getattr(accelerator.state, "fsdp_plugin", None)  # there under FSDP alone
        _refuse_tensor_parallel(size, strategy, model, plugin, remedy)
    shards = _size(accelerator, "dp_shard")
    if shards > 1 and strategy not in ("FSDP", "DEEPSPEED") and not _is_cut_by(model, size * shards):
        raise UnsupportedError(
            f"parallelism_config asks for dp_shard_size={shards}, and FSDP is not on: nobody would shard the model. "
            "Turn FSDP 2 on (distributed_type: FSDP, fsdp_version: 2; in TrainingArguments fsdp=True), or set "
            "dp_shard_size to 1."
        )


def _refuse_tensor_parallel(size: int, strategy: str, model: nn.Module, plugin: Any, remedy: str) -> None:
    if strategy == "DEEPSPEED":
        raise UnsupportedError(
            f"parallelism_config asks for tp_size={size} under DeepSpeed, which is not served. Use FSDP 2 "
            "(distributed_type: FSDP, fsdp_version: 2) over tensor parallelism."
        )
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedError(
            f"parallelism_config asks for tp_size={size}, and the model is not tensor parallel: accelerate would train "
            f"it without. {remedy}"
        )
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise UnsupportedError(
            "fsdp_cpu_ram_efficient_loading takes the weights of rank 0 for those of all ranks, and under tensor "
            "parallelism each has its own. Set fsdp_cpu_ram_efficient_loading: false."
        )


def _is_cut_by(model: nn.Module, num_ranks: int) -> bool:
    """Whether the model came sharded over all of them: placed by transformers, or by torch's ``fully_shard``."""
    return any(isinstance(one, DTensor) and one.device_mesh.size() >= num_ranks for one in model.parameters())


def _size(accelerator: Accelerator, axis: str) -> int:
    sizes: Any = accelerator.parallelism_config
    return int(getattr(sizes, f"{axis}_size", None) or 1)
