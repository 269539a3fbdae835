"""accelerate: FSDP2 over tensor parallelism, which the user has applied to the model before.

Where ``tp_size`` is larger than 1, accelerate places what tensor parallelism left alone on its mesh too, by a class
that transformers no longer has (accelerate 1.15 with transformers 5.23: an ImportError). torch's ``fully_shard`` needs
no such thing, and neither does an optimizer of ours: such parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor

from dist_optim.errors import UnsupportedError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["left_as_it_is", "refuse_unserved"]


@contextmanager
def left_as_it_is(accelerator: Accelerator) -> Iterator[None]:
    """While it prepares a model, accelerate adds nothing to the tensor parallelism of it."""
    vars(accelerator)["_prepare_tp"] = lambda *prepared: prepared
    try:
        yield
    finally:
        del vars(accelerator)["_prepare_tp"]


def refuse_unserved(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse a ``tp_size`` that this model does not have; on this rank alone.

    Raises:
        UnsupportedError: With what to do.
    """
    parallelism: Any = accelerator.parallelism_config
    size = getattr(parallelism, "tp_size", 1)
    if size <= 1:
        return
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedError(
            f"parallelism_config asks for tp_size={size}, and the model is not tensor parallel: accelerate would train "
            "it without. Before prepare, apply torch's parallelize_module over "
            'accelerator.torch_device_mesh["tp"], or load it by from_pretrained with a tp_plan.'
        )
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise UnsupportedError(
            "fsdp_cpu_ram_efficient_loading takes the weights of rank 0 for those of all ranks, and under tensor "
            "parallelism each has its own. Set fsdp_cpu_ram_efficient_loading: false."
        )
