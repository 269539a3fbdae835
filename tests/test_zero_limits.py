"""Every DeepSpeed option that nobody has compared with one process is refused, with what to do instead."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zero
from test_zero_controls import ADAMW, raised_by
from zero import ZeroRun

from dist_optim.errors import UnsupportedError
from dist_optim.integrations.deepspeed.limits import refuse_unserved
from dist_optim.integrations.deepspeed.optimizer import _refuse_metric_schedule
from dist_optim.testing import RankPool

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def offload(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"device": "cpu", "ratio": 1.0, "super_offload": False, **options})


class DeepSpeedEngine:
    """The parts of an engine that are asked, all at their defaults."""

    def __init__(self, zero_config: dict[str, Any] | None = None, **parts: Any) -> None:
        defaults = {"has_moe_layers": False, "mpu": None}
        asked: dict[str, Any] = {"autotp_size": 0, "torch_autocast_enabled": False, "is_deepcompile_enabled": False}
        asked |= {"fp16_enabled": False, "zero_optimization_stage": 0}
        for name, value in {**defaults, **asked, "managed_gradient_accumulation": True, **parts}.items():
            setattr(self, name, value if name in defaults else lambda value=value: value)
        plain = dict.fromkeys(("zenflow", "offload_param", "offload_optimizer"))
        off = dict.fromkeys(("elastic_checkpoint", "zero_quantized_weights", "zero_quantized_gradients"), False)
        sizes = {"zero_quantized_nontrainable_weights": False, "zero_hpz_partition_size": 1}
        self._config = SimpleNamespace(zero_config=SimpleNamespace(**{**plain, **off, **sizes, **(zero_config or {})}))


class PipelineEngine(DeepSpeedEngine):
    pass


class DeepSpeedHybridEngine(DeepSpeedEngine):
    pass


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (PipelineEngine(), "PipelineEngine arranges.*pass a plain model"),
        (DeepSpeedHybridEngine(), "DeepSpeedHybridEngine arranges"),
        (DeepSpeedEngine(has_moe_layers=True), "Mixture-of-experts.*use FSDP2"),
        (DeepSpeedEngine(mpu=object()), "Tensor parallelism"),
        (DeepSpeedEngine(autotp_size=2), "Tensor parallelism.*data parallelism alone"),
        (DeepSpeedEngine(torch_autocast_enabled=True), 'torch_autocast.*"bf16"'),
        (DeepSpeedEngine(is_deepcompile_enabled=True), "DeepCompile"),
        (DeepSpeedEngine(fp16_enabled=True), 'In fp16 without ZeRO.*"bf16"'),
        (DeepSpeedEngine(managed_gradient_accumulation=False), "managed_gradient_accumulation"),
        (DeepSpeedEngine({"zero_hpz_partition_size": 2}), "zero_hpz_partition_size"),
        (DeepSpeedEngine({"zero_quantized_gradients": True}), "zero_quantized"),
        (DeepSpeedEngine({"elastic_checkpoint": True}), "elastic_checkpoint.*false"),
        (DeepSpeedEngine({"zenflow": object()}), "ZenFlow"),
        (DeepSpeedEngine({"offload_param": offload()}), "offload_param"),
        (DeepSpeedEngine({"offload_optimizer": offload(device="nvme")}), 'NVMe.*"device": "cpu"'),
        (DeepSpeedEngine({"offload_optimizer": offload(ratio=0.5)}), '"ratio": 1.0'),
        (DeepSpeedEngine({"offload_optimizer": offload(super_offload=True)}), '"super_offload": false'),
    ],
)
def test_what_is_not_tested_is_refused(engine: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        refuse_unserved(engine)


def test_what_is_tested_is_not_refused() -> None:
    refuse_unserved(DeepSpeedEngine())
    refuse_unserved(DeepSpeedEngine(fp16_enabled=True, zero_optimization_stage=1))
    refuse_unserved(DeepSpeedEngine({"offload_optimizer": offload()}))
    refuse_unserved(DeepSpeedEngine({"offload_optimizer": offload(device="none")}))


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(UnsupportedError, match="Mixture.*ZenFlow"):
        refuse_unserved(DeepSpeedEngine({"zenflow": object()}, has_moe_layers=True))


def test_the_engines_own_parts_are_the_ones_that_are_asked(two_ranks: RankPool) -> None:
    """A renamed attribute of DeepSpeed would make every test above vacuous: here the real engine answers."""
    pytest.importorskip("deepspeed")
    assert two_ranks.run(asked_and_missing) == [[], []]


def asked_and_missing() -> list[str]:
    engine = zero.engine_of(ZeroRun("sgd", {"lr": 0.1}, 2))
    mine = DeepSpeedEngine()
    missing = [name for name in vars(mine) if not hasattr(engine, name)]
    asked = vars(mine._config.zero_config)
    return missing + [name for name in asked if not hasattr(engine._config.zero_config, name)]


@needs_deepspeed
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stage": 0, "config": {"fp16": {"enabled": True}}}, "In fp16 without ZeRO"),
        ({"stage": 2, "config": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}}, "torch_autocast"),
        ({"stage": 3, "config": {"compile": {"deepcompile": True}}}, "DeepCompile"),
        ({"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}, "super_offload"),
    ],
)
def test_the_real_engine_refuses_by_its_configuration(more: dict[str, Any], message: str, two_ranks: RankPool) -> None:
    for said in two_ranks.run(raised_by, ZeroRun("adamw_torch", ADAMW, **more)):
        assert said.startswith("UnsupportedError") and message in said, said


def test_a_metric_schedule_that_the_engine_feeds_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(UnsupportedError, match="batch size as its metric"):
        _refuse_metric_schedule(SimpleNamespace(lr_scheduler=plateau))
    _refuse_metric_schedule(SimpleNamespace(lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1)))
