"""What of DeepSpeed is refused: everything whose trajectory nobody has compared with one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_optim.errors import UnsupportedError

__all__ = ["refuse_unserved"]


def refuse_unserved(engine: Any) -> None:
    """Refuse an engine whose options could change the trajectory in a way that is not tested.

    Raises:
        UnsupportedError: The message lists every such option and what to do instead.
    """
    reasons = list(_reasons(engine))
    if reasons:
        raise UnsupportedError("This DeepSpeed configuration is not served yet: " + " ".join(reasons))


def _reasons(engine: Any) -> Iterator[str]:
    yield from _reasons_of_engine(engine)
    yield from _reasons_of_zero(engine._config.zero_config)


def _reasons_of_engine(engine: Any) -> Iterator[str]:
    kind = type(engine).__name__
    if kind != "DeepSpeedEngine":
        yield f"{kind} arranges parameters in its own way; pass a plain model, and no pipeline or hybrid options."
    if engine.has_moe_layers:
        yield "Mixture-of-experts layers have param groups of their own; use FSDP2 for this model."
    if engine.mpu is not None or engine.autotp_size() > 1:
        yield "Tensor parallelism cuts the matrices that the optimizer needs whole; use data parallelism alone."
    if engine.torch_autocast_enabled():
        yield 'torch_autocast is not tested; set "bf16": {"enabled": true} instead.'
    if engine.is_deepcompile_enabled():
        yield 'DeepCompile replaces the gradient hooks; leave "compile": {"deepcompile": ...} out.'
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        yield (
            "In fp16 without ZeRO, deepspeed 0.19 divides gradients by a loss scale by which it never multiplied the "
            'loss; use "bf16", or ZeRO stage 1.'
        )
    if not engine.managed_gradient_accumulation():
        yield "managed_gradient_accumulation=False is not tested; leave it out."


def _reasons_of_zero(zero: Any) -> Iterator[str]:
    if zero.elastic_checkpoint:
        yield 'elastic_checkpoint cuts optimizer state as if it were flat; set "elastic_checkpoint": false.'
    if zero.zenflow is not None:
        yield 'ZenFlow steps on its own schedule; leave "zenflow" out.'
    if zero.offload_param is not None and _name(zero.offload_param.device) != "none":
        yield 'offload_param is not tested; leave it out ("offload_optimizer" to the CPU saves most).'
    offload = zero.offload_optimizer
    if offload is not None and _name(offload.device) != "none":
        if _name(offload.device) == "nvme":
            yield 'NVMe offload swaps flat state that is not ours; set "offload_optimizer": {"device": "cpu"}.'
        if offload.ratio < 1.0:
            yield 'offload_optimizer.ratio < 1 steps the rest by another optimizer; set "ratio": 1.0.'
        if offload.super_offload:
            yield 'super_offload steps by its own CPU Adam; set "super_offload": false.'
    if zero.zero_hpz_partition_size > 1:
        yield 'Hierarchical partitioning is not tested; set "zero_hpz_partition_size": 1.'
    if zero.zero_quantized_weights or zero.zero_quantized_gradients or zero.zero_quantized_nontrainable_weights:
        yield "Quantized communication changes the values that are trained on; leave zero_quantized_* out."


def _name(device: Any) -> str:
    """DeepSpeed holds the device as an enum member or as its text, depending on where it was set."""
    return str(getattr(device, "value", device))
