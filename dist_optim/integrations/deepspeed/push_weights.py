"""The optimizer's weights into DeepSpeed's model, outside a step."""

from __future__ import annotations

from typing import Any

from dist_optim.layouts.detect_zero import wrapper_kind

__all__ = ["push_weights"]


def push_weights(engine: Any) -> None:
    """Copy the optimizer's weights into the model, outside a step. Collective on all ranks."""
    wrapper, kind = engine.optimizer, wrapper_kind(engine)
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        wrapper.update_lp_params()
    elif kind == "FP16_UnfusedOptimizer":
        for masters, copies in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, copy in zip(masters, copies, strict=True):
                copy.data.copy_(master.data)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        wrapper._partition_all_parameters()  # full copies that a forward pass left would hide the new weights
        for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
