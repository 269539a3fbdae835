"""accelerate's DeepSpeed through ``prepare``: one process's weights, one answer from call and JSON, or a refusal."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zero
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import GradientAccumulationPlugin
from end_to_end import batch
from fresh import forget
from torch import Tensor
from zero import ZeroRun

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.accelerate.deepspeed import settle
from dist_optim.integrations.cpu_rehearsal import deepspeed_arguments
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "no_decay": zero.NO_DECAY}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@contextmanager
def accelerator_of(run: ZeroRun, **arguments: Any) -> Iterator[Accelerator]:
    """An Accelerator with the run's configuration, its optimizer section left out; its process-wide state ends here."""
    config = {key: value for key, value in run.json().items() if key != "optimizer"}
    with mock.patch.dict(os.environ):
        zero.deepspeed()
        try:
            yield Accelerator(
                **{**deepspeed_arguments(), **arguments},
                deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=run.accumulation, sync_with_dataloader=False
                ),
            )
        finally:
            forget()


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def train_through_prepare(run: ZeroRun, clip: float) -> list[list[Tensor]]:
    """The model's weights in every evaluation, and at the end."""
    seen = []
    with accelerator_of(run) as accelerator:
        model, optimizer, scheduler = prepare(
            accelerator, run.make_model(), run.name, scheduler=halving, print_audit=False, **run.options
        )
        assert scheduler is not None
        for step in range(zero.STEPS):
            for part in zero.parts_of(run, step):
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=part, labels=part).loss)
                    if accelerator.sync_gradients and clip:
                        assert accelerator.clip_grad_norm_(model.parameters(), clip) > clip, "clipping must bind"
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            if step % 3 == 2:
                optimizer.eval()
                seen.append(zero.weights_of(model, run))
                optimizer.train()
        assert optimizer.param_groups[0]["lr"] == run.options["lr"] / 8
    return seen


def train_alone(run: ZeroRun, clip: float) -> list[list[Tensor]]:
    reference, seen = zero.Reference(run), []
    scheduler = halving(reference.optimizer)
    world_size = dist.get_world_size()
    for step in range(zero.STEPS):
        parts = [part for own in batch(step).chunk(world_size) for part in own.chunk(run.accumulation)]
        for part in parts:
            (zero.loss_of(reference.model, part, step) / len(parts)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(reference.model.parameters(), clip)
        reference.optimizer.step()
        scheduler.step()
        reference.optimizer.zero_grad()
        if step % 3 == 2:
            reference.optimizer.eval()
            seen.append(reference.weights())
            reference.optimizer.train()
    return seen


def distances_of_the_loop(run: ZeroRun) -> list[float]:
    clip = run.config.get("gradient_clipping", 0.0)
    pairs = zip(train_through_prepare(run, clip), train_alone(run, clip), strict=True)
    return [zero.relative_distance(ours, alone, zero.start_of(run)) for ours, alone in pairs]


SCHEDULE_FREE = ZeroRun("schedule_free_adamw", ADAMW, 2, real_batches=True)
LOOPS = {
    "schedule-free evaluated, stage 2": SCHEDULE_FREE,
    "schedule-free evaluated, stage 3": replace(SCHEDULE_FREE, stage=3),
    "galore, clipped and accumulated": ZeroRun(
        "galore_adamw",
        {**ADAMW, **zero.GALORE},
        2,
        config={"gradient_clipping": 0.1, "gradient_accumulation_steps": 2},
        real_batches=True,
    ),
    "galore, offloaded": ZeroRun("galore_adamw", {**ADAMW, **zero.GALORE}, 2, zero=OFFLOAD, real_batches=True),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_equals_one_process(name: str, two_ranks: RankPool) -> None:
    # Clipping sums its norm over partitions, which rounds otherwise.
    floor = 1e-5 if "clipped" in name else 0.0
    for distances in two_ranks.run(distances_of_the_loop, LOOPS[name]):
        assert distances == [pytest.approx(0, abs=floor)] * 2


def prepared_with(section: dict[str, Any] | None, optimizer: str, options: dict[str, Any]) -> dict[str, Any] | str:
    """The first param group of what ``prepare`` builds, or the refusal."""
    run = ZeroRun("", {}, 2)
    with accelerator_of(run) as accelerator:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if section is not None:
            config["optimizer"] = section
        try:
            _, prepared, _ = prepare(accelerator, run.make_model(), optimizer, print_audit=False, **options)
        except DistOptimError as error:
            return f"{type(error).__name__}: {error}"
        return {key: value for key, value in prepared.param_groups[0].items() if key != "params"}


def test_the_call_fills_in_what_the_configuration_leaves_out(two_ranks: RankPool) -> None:
    section = {"type": "sgd", "params": {"lr": "auto", "momentum": 0.9}}
    for group in two_ranks.run(prepared_with, section, "sgd", {"lr": 0.3, "weight_decay": 0.2}):
        assert isinstance(group, dict)
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 0.2)


@pytest.mark.parametrize(
    ("section", "optimizer", "options", "message"),
    [
        ({"type": "sgd", "params": {"lr": 0.1}}, "sgd", {"lr": 0.2}, "call gives lr=0.2.*configuration 0.1"),
        ({"type": "sgd", "params": {"lr": 0.1}}, "adamw_torch", {}, "asks for 'adamw_torch'.*configuration for 'sgd'"),
        ({"type": "adagrad", "params": {"lr": 0.1}}, "adagrad", {}, "it is DeepSpeed's own; ours is 'dist_optim.adagr"),
        (None, "galore_adamw", {"lr": 0.1}, "target_modules"),
        (None, "sgd", {"lr": 0.1, "bucket_bytes": 1}, "no hyperparameter 'bucket_bytes'"),
    ],
)
def test_what_contradicts_is_refused_on_all_ranks(
    section: dict[str, Any] | None, optimizer: str, options: dict[str, Any], message: str, two_ranks: RankPool
) -> None:
    for said in two_ranks.run(prepared_with, section, optimizer, options):
        assert re.search(message, str(said)), said


def test_lists_and_tuples_are_the_same_value() -> None:
    section = {"type": "dist_optim.sgd", "params": {"betas": [0.9, 0.99], "target_modules": ["attn"]}}
    merged = settle(section, "sgd", {"betas": (0.9, 0.99), "target_modules": None, "lr": 1.0})
    assert merged == {"betas": [0.9, 0.99], "target_modules": ["attn"], "lr": 1.0}


def refused_by(mistake: str) -> str:
    run = ZeroRun("", {}, 2)
    config: dict[str, Any] = {}
    if mistake == "two schedules":
        config = {"scheduler": {"type": "WarmupLR", "params": {}}}
    elif mistake == "auto batch":
        config = {"train_micro_batch_size_per_gpu": "auto"}
    unseen: dict[str, Any] = {"kwargs_handlers": []} if mistake == "unseen ranks" else {}
    with accelerator_of(replace(run, config=config), **unseen) as accelerator:
        try:
            prepare(accelerator, run.make_model(), "sgd", lr=0.1, scheduler=halving, print_audit=False)
            accelerator.clip_grad_norm_([], 0.5)
        except DistOptimError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("two schedules", '"scheduler" section'),
        ("auto batch", "accelerate knows no data loader"),
        ("unseen ranks", "accelerate sees 1.*deepspeed_arguments"),
        ("another clipping", '"gradient_clipping": 0.5'),
    ],
)
def test_what_accelerate_would_ignore_is_refused(mistake: str, message: str, two_ranks: RankPool) -> None:
    for said in two_ranks.run(refused_by, mistake):
        assert re.search(message, said), said


class PretendedCpuAdam(torch.optim.Adam):
    """In the place of DeepSpeedCPUAdam, which takes a compiler and a minute."""

    def __init__(self, groups: Any, adamw_mode: bool, **options: Any) -> None:
        super().__init__(groups, **options)


def client_optimizer(kind: str) -> str:
    """What a user meets who gives our optimizer to ``accelerator.prepare`` instead of to ours."""
    from deepspeed.ops import adam

    from dist_optim.integrations.deepspeed import build_optimizer_for_engine

    run = ZeroRun("sgd", {"lr": 0.1}, 2, zero=OFFLOAD if kind == "swapped" else {})
    with accelerator_of(run) as accelerator, mock.patch.object(adam, "DeepSpeedCPUAdam", PretendedCpuAdam):
        model = run.make_model()
        if kind == "swapped":
            optimizer: torch.optim.Optimizer = build_optimizer_for_engine(model, "sgd", lr=0.1, print_audit=False)
        else:
            optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
        try:
            accelerator.prepare(model, optimizer)
        except DistOptimError as error:
            return str(error)
    return ""


def test_the_silent_exchange_for_deepspeeds_adam_is_refused(two_ranks: RankPool) -> None:
    for said in two_ranks.run(client_optimizer, "swapped"):
        assert "PretendedCpuAdam was put in the place" in said and "zero_force_ds_cpu_optimizer" in said


def test_an_optimizer_of_the_plain_model_is_refused(two_ranks: RankPool) -> None:
    for said in two_ranks.run(client_optimizer, "plain"):
        assert "integrations.accelerate.prepare" in said
