"""Updates inside backward under ZeRO-3, against one process on the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from end_to_end import batch, make_llama
from placements import own_group
from zero import deepspeed

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.integrations.deepspeed.inside_backward import build_fused_optimizer
from dist_optim.testing import RankPool, relative_distance

STEPS = 5
NOISE = 1e-5
JOBS: dict[str, dict[str, Any]] = {
    "lomo": {"lr": 1e-1, "weight_decay": 0.01, "clip_grad_value": 0.02},
    "adalomo": {"lr": 1e-2, "weight_decay": 0.01},
    "galore_adamw_layerwise": {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3},
}


def engine_of(config: dict[str, Any], threshold: int = 0) -> Any:
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9, **config}
    model = make_llama()
    engine, *_ = deepspeed().initialize(model=model, config=config)
    return engine


def rate(options: dict[str, Any], step: int) -> float:
    return float(options["lr"] * 0.9**step)


def distance(name: str) -> tuple[float, int]:
    """From one process, and bytes of gradients that are stored after backward."""
    options, plain = JOBS[name], name.removesuffix("_layerwise")
    model = make_llama()
    stored = {**options, "fused_backward": False} if plain == name else options
    reference = dist_optim.build_optimizer(model, plain, process_group=own_group(), print_audit=False, **stored)
    start = [p.detach().clone() for p in model.parameters()]
    engine = engine_of({})
    optimizer = build_fused_optimizer(engine, name, print_audit=False, bucket_bytes=100_000, **options)
    left = 0
    for step in range(STEPS):
        for one in (reference, optimizer):
            for group in one.param_groups:
                group["lr"] = rate(options, step)
        full = batch(step)
        model(input_ids=full, labels=full).loss.backward()
        reference.step()
        reference.zero_grad()
        own = full.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.backward(engine.module(input_ids=own, labels=own).loss)
        left += sum(p.grad.nbytes for p in engine.module.parameters() if p.grad is not None)
        optimizer.step()
    with deepspeed().zero.GatheredParameters(list(engine.module.parameters())):
        arrived = [p.detach().clone() for p in engine.module.parameters()]
    return relative_distance(arrived, [p.detach() for p in model.parameters()], start), left


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("pool", ["two_ranks", "three_ranks"])
def test_ends_where_one_process_does(name: str, pool: str, request: pytest.FixtureRequest) -> None:
    for gap, left in request.getfixturevalue(pool).run(distance, name):
        assert gap < NOISE
        assert left == 0


def refusals() -> list[str]:
    found = []
    for make in (
        lambda: build_fused_optimizer(engine_of({}, threshold=10**6), "lomo", lr=0.1),
        lambda: build_fused_optimizer(engine_of({}), "lomo", lr=0.1, clip_grad_norm=1.0),
        lambda: build_fused_optimizer(engine_of({}), "grokadamw", lr=0.1),
    ):
        try:
            make()
        except UnsupportedError as error:
            found.append(str(error))
    return found


def test_refusals(two_ranks: RankPool) -> None:
    for threshold, clip, kind in two_ranks.run(refusals):
        assert "stage3_param_persistence_threshold" in threshold
        assert "Use clip_grad_value" in clip
        assert "Name it in DeepSpeed's JSON" in kind
