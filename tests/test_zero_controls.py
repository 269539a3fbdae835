"""DeepSpeed: names, refusals, and that the comparisons of ``test_zero`` see the bugs they are there for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zero
from fresh import forget
from zero import ZeroRun

import dist_optim
from dist_optim.errors import DistOptimError, UnsupportedError, UnsupportedLayoutError
from dist_optim.layouts import detect_zero
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

CONFIGS = Path(__file__).parents[1] / "configs" / "deepspeed"
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def raised_by(run: ZeroRun) -> str:
    """The error of building an engine for the run; empty where there is none."""
    try:
        zero.engine_of(run)
    except DistOptimError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stage": 2, "zero": {"elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"stage": 3, "zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}, "NVMe"),
        ({"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"stage": 3, "zero": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"stage": 3, "zero": {"zero_quantized_weights": True}}, "zero_quantized"),
        ({"stage": 3, "zero": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"stage": 2, "zero": {"zenflow": {"topk_ratio": 0.1}, "offload_optimizer": {"device": "cpu"}}}, "ZenFlow"),
    ],
)
def test_what_is_not_tested_is_refused_with_the_remedy(more: dict[str, Any], message: str, two_ranks: RankPool) -> None:
    for said in two_ranks.run(raised_by, ZeroRun("adamw_torch", ADAMW, **more)):
        assert said.startswith("UnsupportedError") and message in said


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("galore_adam", ADAMW, "galore_adam is not a supported DeepSpeed Optimizer.*galore_adamw"),
        ("galore_adamw", {**ADAMW, "rank": 8}, "target_modules"),
        ("galore_adamw", {**ADAMW, "rnak": 8, "target_modules": "all-linear"}, "rank"),
        ("adamw_torch", {**ADAMW, "max_grad_norm": 1.0}, "no hyperparameter 'max_grad_norm'"),
        ("galore_adamw_layerwise", {**ADAMW, "target_modules": "all-linear"}, "UnsupportedError"),
    ],
)
def test_a_wrong_name_or_value_raises_on_all_ranks(
    name: str, options: dict[str, Any], message: str, two_ranks: RankPool
) -> None:
    for said in two_ranks.run(raised_by, ZeroRun(name, options, 2)):
        assert re.search(message, said)


def names_that_resolve() -> list[str]:
    package = zero.deepspeed()
    engine = package.DeepSpeedEngine
    return [name for name in dist_optim.names() if engine._is_supported_optimizer(None, f"dist_optim.{name}")]


def test_every_registered_name_resolves(one_rank: RankPool) -> None:
    assert one_rank.run(names_that_resolve) == [dist_optim.names()]


def test_a_name_that_deepspeed_has_too_is_ours_with_the_prefix(two_ranks: RankPool) -> None:
    run = ZeroRun("dist_optim.adagrad", {"lr": 1e-2}, 2, real_batches=True)
    assert two_ranks.run(zero.distance, run) == [0.0, 0.0]


def other_version() -> str:
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import utils

    from dist_optim import overrides
    from dist_optim.integrations.deepspeed import register
    from dist_optim.integrations.deepspeed.optimizer import ZeroOptimizer

    zero.deepspeed()
    overrides.check.cache_clear()  # as in a process that has not looked yet
    known = engine.DeepSpeedEngine._configure_optimizer
    utils.ZERO_SUPPORTED_OPTIMIZERS.remove(ZeroOptimizer)
    engine.DeepSpeedEngine._configure_optimizer = lambda self, other: None
    try:
        register()
    except UnsupportedError as error:
        return str(error)
    finally:
        engine.DeepSpeedEngine._configure_optimizer = known
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(ZeroOptimizer)
    return ""


def test_an_unknown_version_is_refused(one_rank: RankPool) -> None:
    (said,) = one_rank.run(other_version)
    assert "_configure_optimizer" in said and "deepspeed" in said and "0.19.8" in said


def engine_given_to_build_optimizer() -> str:
    engine = zero.engine_of(ZeroRun("sgd", {"lr": 0.1}, 2))
    try:
        dist_optim.build_optimizer(engine, "sgd", lr=0.1, print_audit=False)
    except UnsupportedLayoutError as error:
        return str(error)
    return ""


def test_an_engine_given_to_build_optimizer_is_refused(two_ranks: RankPool) -> None:
    for said in two_ranks.run(engine_given_to_build_optimizer):
        assert "DeepSpeed" in said


def metric_schedule() -> str:
    run = ZeroRun("sgd", {"lr": 0.1}, 0)
    engine = zero.engine_of(run)
    engine.lr_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(engine.basic_optimizer)
    try:
        zero.train_engine(engine, run)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_metric_schedule_fed_by_the_engine_is_refused(two_ranks: RankPool) -> None:
    assert all("ReduceLROnPlateau" in said for said in two_ranks.run(metric_schedule))


def stale_gradient_in_the_norm(clip: float) -> str:
    run = ZeroRun("adamw_torch", ADAMW, 3, config={"gradient_clipping": clip}, make_model=zero.SometimesIdle)
    try:
        zero.train_engine(zero.engine_of(run), run)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_clipping_by_a_stale_gradient_is_refused(two_ranks: RankPool) -> None:
    assert all("gradient_clipping" in said for said in two_ranks.run(stale_gradient_in_the_norm, 1.0))
    assert two_ranks.run(stale_gradient_in_the_norm, 0.0) == ["", ""]


def distance_through_accelerate(run: ZeroRun) -> float:
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.utils import DummyOptim

    zero.deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        config = run.json()
        config["optimizer"]["params"] = {**run.options, "lr": "auto", "weight_decay": "auto"}
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
        plain = run.make_model()
        named = DummyOptim(plain.parameters(), lr=run.options["lr"], weight_decay=run.options["weight_decay"])
        model, optimizer = accelerator.prepare(plain, named)
        for step in range(zero.STEPS):
            for part in zero.parts_of(run, step):
                accelerator.backward(zero.loss_of(model, part, step))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        forget()
    expected = zero.Reference(run).train().weights()
    return zero.relative_distance(zero.weights_of(model, run), expected, zero.start_of(run))


@pytest.mark.parametrize("more", [{}, {"offload_optimizer": {"device": "cpu"}}], ids=["", "offload"])
def test_accelerate_resolves_the_name_and_fills_in_auto(more: dict[str, Any], two_ranks: RankPool) -> None:
    run = ZeroRun("galore_adamw", {**ADAMW, **zero.GALORE}, 2, zero=more, real_batches=True)
    assert two_ranks.run(distance_through_accelerate, run) == [0.0, 0.0]


def steps_taken_with(config: dict[str, Any]) -> int:
    run = ZeroRun("galore_adamw", {}, config["zero_optimization"]["stage"])
    filled = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    config = {"optimizer": {"type": "galore_adamw", "params": {"lr": 1e-3, **zero.GALORE}}, **config}
    config |= {key: value for key, value in filled.items() if config[key] == "auto"}
    config |= {"gradient_clipping": 1.0, "bf16": {"enabled": False}}  # what transformers fills in besides
    engine = zero.deepspeed().initialize(model=run.make_model(), config=config)[0]
    zero.train_engine(engine, run, range(2))
    return engine.basic_optimizer.num_steps


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_the_configurations_train(name: str, two_ranks: RankPool) -> None:
    config = json.loads((CONFIGS / name).read_text())
    assert two_ranks.run(steps_taken_with, config) == [2, 2]


# Negative controls -----------------------------------------------------------------------------------------------


def with_presence_as_deepspeed_shows_it(run: ZeroRun) -> float:
    from dist_optim.stepping.presence import StepAgreement

    before = StepAgreement.before

    def every_one(self: StepAgreement, *args: Any, **options: Any) -> list[bool]:
        present = before(self, *args, **options)
        return present if self._is_alone else [True] * len(present)  # alone is the reference

    with mock.patch.object(StepAgreement, "before", every_one):
        return zero.distance(run)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zeros_in_place_of_no_gradient_are_seen(stage: int, two_ranks: RankPool) -> None:
    run = ZeroRun("adamw_torch", ADAMW, stage, real_batches=True, make_model=zero.SometimesIdle)
    assert min(two_ranks.run(with_presence_as_deepspeed_shows_it, run)) > 1e-3


def with_shifted_slices(run: ZeroRun) -> str:
    cut = detect_zero.ParamSlice._cut
    detect_zero.ParamSlice._cut = lambda self, whole: (  # type: ignore[method-assign]
        whole if self.layout.is_replicated else whole.view(-1).narrow(0, max(self.offset - 1, 0), self.numel)
    )
    try:
        return raised_by(run)
    finally:
        detect_zero.ParamSlice._cut = cut  # type: ignore[method-assign]


def with_overlapping_ranges(run: ZeroRun) -> str:
    range_of = detect_zero._range_of
    detect_zero._range_of = lambda part, rank: (0, part.numel)
    try:
        return raised_by(run)
    finally:
        detect_zero._range_of = range_of


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_layout_that_is_not_what_it_seems_is_refused(stage: int, two_ranks: RankPool) -> None:
    run = ZeroRun("adamw_torch", ADAMW, stage)
    assert all("own values" in said for said in two_ranks.run(with_shifted_slices, run))
    assert all("do not tile" in said for said in two_ranks.run(with_overlapping_ranges, run))


def with_upstream_on_the_flat_partition(stage: int) -> float:
    from transformers.optimization import Adafactor

    package = zero.deepspeed()
    options = {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "warmup_init": False}
    run = ZeroRun("adafactor", {"lr": 1e-2}, stage, real_batches=True)
    model = run.make_model()
    config = {key: value for key, value in run.json().items() if key != "optimizer"}
    engine = package.initialize(
        model=model,
        optimizer=Adafactor(model.parameters(), **options),
        config={**config, "zero_allow_untested_optimizer": True},
    )[0]
    zero.train_engine(engine, run)
    expected = zero.Reference(run).train().weights()
    return zero.relative_distance(zero.weights_of(engine, run), expected, zero.start_of(run))


def test_upstream_alone_on_the_flat_partition_is_seen_to_differ(two_ranks: RankPool) -> None:
    assert two_ranks.run(with_upstream_on_the_flat_partition, 0) == [0.0, 0.0]
    assert min(two_ranks.run(with_upstream_on_the_flat_partition, 2)) > 0.1


def way_of_deepspeed_in_fp16_without_zero() -> float:
    """torch's SGD, without our code: how far it goes, in units of the way of one process."""
    run = ZeroRun("sgd", {"lr": 1e-1}, 0, real_batches=True, config={"fp16": {"enabled": True, "loss_scale": 256}})
    config = {key: value for key, value in run.json().items() if key != "optimizer"}
    model = run.make_model()
    engine = zero.deepspeed().initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-1), config=config
    )[0]
    zero.train_engine(engine, run)
    start, expected = zero.start_of(run), zero.Reference(run).train().weights()
    return zero.relative_distance(zero.weights_of(engine, run), start, expected)


def test_deepspeed_in_fp16_without_zero_hardly_moves(two_ranks: RankPool) -> None:
    """It divides gradients by a scale that the loss never had: why this is refused."""
    assert max(two_ranks.run(way_of_deepspeed_in_fp16_without_zero)) < 0.1
