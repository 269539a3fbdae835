"""What of DeepSpeed is refused: everything whose trajectory nobody has compared with one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from dist_optim.errors import UnsupportedError

__all__ = ["LIMITS", "Limit", "Setup", "refuse_unserved", "setup_of_json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What DeepSpeed is asked for, as far as it decides whether it is served: of an engine, or of a JSON file."""

    zero: Any
    """The section on ZeRO, with DeepSpeed's own names and defaults."""
    stage: int
    is_fp16: bool = False
    engine: str = "DeepSpeedEngine"
    has_experts: bool = False
    is_tensor_parallel: bool = False
    has_autocast: bool = False
    is_deep_compiled: bool = False
    manages_accumulation: bool = True


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that is not served."""

    code: str
    is_met: Callable[[Setup], bool]
    reason: str
    """What it is, and what to do instead; ``{engine}`` is the engine's class."""
    patch: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the JSON that serve, by their dotted place; None takes the entry out."""


def _offloads(setup: Setup) -> bool:
    offload = setup.zero.offload_optimizer
    return offload is not None and _name(offload.device) != "none"


def _loads_params(setup: Setup) -> bool:
    offload = setup.zero.offload_param
    return offload is not None and _name(offload.device) != "none"


def _is_quantized(setup: Setup) -> bool:
    zero = setup.zero
    return bool(
        zero.zero_quantized_weights or zero.zero_quantized_gradients or zero.zero_quantized_nontrainable_weights
    )


_ZERO = "zero_optimization"
LIMITS = (
    Limit(
        "engine",
        lambda setup: setup.engine != "DeepSpeedEngine",
        "{engine} arranges parameters in its own way; pass a plain model, and no pipeline or hybrid options.",
        {"hybrid_engine": None},
    ),
    Limit(
        "experts",
        lambda setup: setup.has_experts,
        "Mixture-of-experts layers have param groups of their own; use FSDP2 for this model.",
    ),
    Limit(
        "tensor-parallel",
        lambda setup: setup.is_tensor_parallel,
        "Tensor parallelism cuts the matrices that the optimizer needs whole; use data parallelism alone.",
        {"tensor_parallel": None},
    ),
    Limit(
        "autocast",
        lambda setup: setup.has_autocast,
        'torch_autocast is not tested; set "bf16": {"enabled": true} instead.',
        {"torch_autocast": None, "bf16.enabled": True},
    ),
    Limit(
        "deepcompile",
        lambda setup: setup.is_deep_compiled,
        'DeepCompile replaces the gradient hooks; leave "compile": {"deepcompile": ...} out.',
        {"compile": None},
    ),
    Limit(
        "fp16-without-zero",
        lambda setup: setup.is_fp16 and setup.stage == 0,
        "In fp16 without ZeRO, deepspeed 0.19 divides gradients by a loss scale by which it never multiplied the "
        'loss; use "bf16", or ZeRO stage 1.',
        {f"{_ZERO}.stage": 1},
    ),
    Limit(
        "accumulation",
        lambda setup: not setup.manages_accumulation,
        "managed_gradient_accumulation=False is not tested; leave it out.",
    ),
    Limit(
        "elastic-checkpoint",
        lambda setup: setup.zero.elastic_checkpoint,
        'elastic_checkpoint cuts optimizer state as if it were flat; set "elastic_checkpoint": false.',
        {f"{_ZERO}.elastic_checkpoint": False},
    ),
    Limit(
        "zenflow",
        lambda setup: setup.zero.zenflow is not None,
        'ZenFlow steps on its own schedule; leave "zenflow" out.',
        {f"{_ZERO}.zenflow": None},
    ),
    Limit(
        "offload-param",
        _loads_params,
        'offload_param is not tested; leave it out ("offload_optimizer" to the CPU saves most).',
        {f"{_ZERO}.offload_param": None},
    ),
    Limit(
        "offload-nvme",
        lambda setup: _offloads(setup) and _name(setup.zero.offload_optimizer.device) == "nvme",
        'NVMe offload swaps flat state that is not ours; set "offload_optimizer": {"device": "cpu"}.',
        {f"{_ZERO}.offload_optimizer.device": "cpu", f"{_ZERO}.offload_optimizer.nvme_path": None},
    ),
    Limit(
        "offload-ratio",
        lambda setup: _offloads(setup) and setup.zero.offload_optimizer.ratio < 1.0,
        'offload_optimizer.ratio < 1 steps the rest by another optimizer; set "ratio": 1.0.',
        {f"{_ZERO}.offload_optimizer.ratio": 1.0},
    ),
    Limit(
        "super-offload",
        lambda setup: _offloads(setup) and setup.zero.offload_optimizer.super_offload,
        'super_offload steps by its own CPU Adam; set "super_offload": false.',
        {f"{_ZERO}.offload_optimizer.super_offload": False},
    ),
    Limit(
        "hierarchical-partition",
        lambda setup: setup.zero.zero_hpz_partition_size > 1,
        'Hierarchical partitioning is not tested; set "zero_hpz_partition_size": 1.',
        {f"{_ZERO}.zero_hpz_partition_size": 1},
    ),
    Limit(
        "quantized-communication",
        _is_quantized,
        "Quantized communication changes the values that are trained on; leave zero_quantized_* out.",
        {
            f"{_ZERO}.zero_quantized_weights": None,
            f"{_ZERO}.zero_quantized_gradients": None,
            f"{_ZERO}.zero_quantized_nontrainable_weights": None,
        },
    ),
)


def refuse_unserved(engine: Any) -> None:
    """Refuse an engine whose options could change the trajectory in a way that is not tested.

    Raises:
        UnsupportedError: The message lists every such option and what to do instead.
    """
    setup = _setup_of_engine(engine)
    reasons = [limit.reason.replace("{engine}", setup.engine) for limit in LIMITS if limit.is_met(setup)]
    if reasons:
        raise UnsupportedError("This DeepSpeed configuration is not served yet: " + " ".join(reasons))


def _setup_of_engine(engine: Any) -> Setup:
    return Setup(
        zero=engine._config.zero_config,
        stage=engine.zero_optimization_stage(),
        is_fp16=engine.fp16_enabled(),
        engine=type(engine).__name__,
        has_experts=engine.has_moe_layers,
        is_tensor_parallel=engine.mpu is not None or engine.autotp_size() > 1,
        has_autocast=engine.torch_autocast_enabled(),
        is_deep_compiled=engine.is_deepcompile_enabled(),
        manages_accumulation=engine.managed_gradient_accumulation(),
    )


_OFFLOAD_DEFAULTS = {"device": "none", "ratio": 1.0, "super_offload": False}
_ZERO_DEFAULTS = {
    "elastic_checkpoint": False,
    "zenflow": None,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
}


def setup_of_json(config: Mapping[str, Any]) -> Setup:
    """The same of a configuration, before there is an engine. "auto" is what DeepSpeed takes where nothing is said."""
    zero = _section(config, _ZERO)
    offloads = {
        key: SimpleNamespace(**{**_OFFLOAD_DEFAULTS, **_settled(zero[key])}) if zero.get(key) else None
        for key in ("offload_optimizer", "offload_param")
    }
    return Setup(
        zero=SimpleNamespace(**{**_ZERO_DEFAULTS, **_settled(zero), **offloads}),
        stage=int(_settled(zero).get("stage", 0)),
        is_fp16=_section(config, "fp16").get("enabled") is True,
        engine="DeepSpeedHybridEngine" if _section(config, "hybrid_engine").get("enabled") else "DeepSpeedEngine",
        is_tensor_parallel=_section(config, "tensor_parallel").get("autotp_size", 1) > 1,
        has_autocast=_section(config, "torch_autocast").get("enabled") is True,
        is_deep_compiled=_section(config, "compile").get("deepcompile") is True,
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _settled(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value != "auto"}


def _name(device: Any) -> str:
    """DeepSpeed holds the device as an enum member or as its text, depending on where it was set."""
    return str(getattr(device, "value", device))
