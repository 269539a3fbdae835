"""What DeepSpeed's own Muon got wrong over the years, put into our adapter: each would be seen by these tests.

Weights that straddle a partition boundary (its #7807), momentum that an overflow poisons (#8432), shapes read from the
placeholders of ``zero.Init`` (#8438), and one update for each micro-batch (#8443).
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import zero
from test_zero import OPTIMIZERS
from torch import Tensor
from zero import ZeroRun

from dist_optim.integrations.deepspeed import optimizer as zero_optimizer
from dist_optim.layouts.detect_zero import Call
from dist_optim.stepping import division
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def run_of(name: str, stage: int, **more: Any) -> ZeroRun:
    return ZeroRun(name, OPTIMIZERS[name], stage, real_batches=True, **more)


# A weight that straddles the boundary ---------------------------------------------------------------------------


def distance_with_halves_stepped_alone(run: ZeroRun) -> float:
    """Each rank steps the half of the matrix that it holds."""
    with mock.patch.object(division, "runs_on_local_slices", lambda *_: True):
        engine = zero.engine_of(run)
    zero.train_engine(engine, run)
    expected = zero.Reference(run).train().weights()
    return zero.relative_distance(zero.weights_of(engine, run), expected, zero.start_of(run))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_weight_stepped_in_two_halves_is_seen(stage: int, two_ranks: RankPool) -> None:
    run = run_of("adafactor", stage)
    assert two_ranks.run(zero.distance, run) == [0.0, 0.0]
    assert min(two_ranks.run(distance_with_halves_stepped_alone, run)) > 1e-3


# Overflow -------------------------------------------------------------------------------------------------------


def changed_by_overflow(run: ZeroRun, is_injected: bool) -> list[str]:
    """What a step that overflows changes of weights, state and counters, after two good ones."""
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(2))
    weights, state = zero.weights_of(engine, run), copy.deepcopy(engine.basic_optimizer.state_dict())
    engine.optimizer.loss_scaler.cur_scale = 2.0**40
    skipped = engine.skipped_steps
    if is_injected:
        _step_on_overflow(engine)
    zero.train_engine(engine, run, range(2, 3))
    assert engine.skipped_steps == skipped + 1 or is_injected
    found = [] if all(map(torch.equal, weights, zero.weights_of(engine, run))) else ["weights"]
    return found + _differences(state, engine.basic_optimizer.state_dict())


def _step_on_overflow(engine: Any) -> None:
    """The optimizer sees the gradients of a step that is then skipped, as far as they are finite."""
    optimizer, skip = engine.basic_optimizer, engine.optimizer._update_scale

    def _update_scale(has_overflow: Any) -> None:
        assert has_overflow
        weights = optimizer.copied_weights()
        for part in optimizer.parts():
            for placed in part.placed_parameters():
                placed.parameter.grad = torch.zeros_like(placed.parameter)
            part.step_part([True] * len(part.holdings.placed))
        optimizer.write_weights(weights)
        skip(has_overflow)

    engine.optimizer._update_scale = _update_scale


def _differences(before: Any, after: Any, at: str = "state") -> list[str]:
    if isinstance(before, Tensor):
        return [] if torch.equal(before, after) else [at]
    if isinstance(before, (dict, list)):
        keys = before.keys() if isinstance(before, dict) else range(len(before))
        return [found for key in keys for found in _differences(before[key], after[key], f"{at}.{key}")]
    return [] if before == after else [at]


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}
OVERFLOWS = [(name, stage) for stage in (1, 2, 3) for name in ("galore_adamw", "schedule_free_adamw")]


@pytest.mark.parametrize(("name", "stage"), [*OVERFLOWS, ("grokadamw", 2), ("adamw_bnb_8bit", 3)])
def test_an_overflow_changes_nothing(name: str, stage: int, two_ranks: RankPool) -> None:
    assert two_ranks.run(changed_by_overflow, run_of(name, stage, config=FP16), False) == [[], []]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_momentum_that_an_overflow_moves_is_seen(stage: int, two_ranks: RankPool) -> None:
    for found in two_ranks.run(changed_by_overflow, run_of("galore_adamw", stage, config=FP16), True):
        assert "weights" not in found and any("exp_avg" in name for name in found), found


# Placeholders of zero.Init --------------------------------------------------------------------------------------


def distance_with_placeholders_for_shapes(run: ZeroRun) -> float:
    """``zero.Init`` leaves 1-D tensors in the place of matrices: whoever trusts them factors nothing."""
    read = zero_optimizer.read_calls

    def flat(*arguments: Any) -> list[Call]:
        return [
            Call({n: replace(part, shape=torch.Size([part.shape.numel()])) for n, part in call.slices.items()})
            for call in read(*arguments)
        ]

    with mock.patch.object(zero_optimizer, "read_calls", flat):
        return zero.distance(run)


def test_shapes_of_placeholders_are_seen(two_ranks: RankPool) -> None:
    run = run_of("adafactor", 3, init=True)
    assert two_ranks.run(zero.distance, run) == [0.0, 0.0]
    assert min(two_ranks.run(distance_with_placeholders_for_shapes, run)) > 1e-3


# Micro-batches --------------------------------------------------------------------------------------------------


def distance_with_a_step_for_each_micro_batch(run: ZeroRun) -> float:
    step = zero_optimizer.ZeroOptimizer.step

    def step_twice(self: zero_optimizer.ZeroOptimizer, closure: Any = None) -> None:
        if self.is_attached:
            weights = self.copied_weights()
            step(self, closure)
            self.write_weights(weights)  # momentum moves with every micro-batch, the weights once
        step(self, closure)

    with mock.patch.object(zero_optimizer.ZeroOptimizer, "step", step_twice):
        return zero.distance(run)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_for_each_micro_batch_is_seen(stage: int, two_ranks: RankPool) -> None:
    run = run_of("galore_adamw", stage, config={"gradient_accumulation_steps": 2})
    assert max(two_ranks.run(zero.distance, run)) < 1e-5  # the engine sums micro-batches first, then ranks
    assert min(two_ranks.run(distance_with_a_step_for_each_micro_batch, run)) > 1e-3
