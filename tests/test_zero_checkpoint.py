"""DeepSpeed's checkpoints of our optimizers: ``zero_to_fp32`` finds the weights, and saving changes nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import zero
from test_zero import BF16, OPTIMIZERS
from torch import Tensor
from zero import Recorder, Reference, ZeroRun

from dist_optim.integrations.deepspeed import optimizer as zero_optimizer
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def converted(directory: str, run: ZeroRun) -> list[Tensor]:
    """What ``zero_to_fp32`` makes of the checkpoint, in the order of the parameters."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(directory, tag="half")
    return [weights[name].float() for name, _ in run.make_model().named_parameters()]


def distances_of_checkpoint(run: ZeroRun, directory: str) -> list[float]:
    """From the reference's delivered weights: ``zero_to_fp32``; then, of the run that saved and of one that resumed."""
    reference, engine = Reference(run), zero.engine_of(run)
    recorder = Recorder(engine)
    follow(engine, recorder, reference, run, range(3))
    engine.save_checkpoint(directory, tag="half")
    resumed = zero.engine_of(run)
    resumed.load_checkpoint(directory, tag="half")
    reference.optimizer.eval()
    delivered = [p.detach().float().clone() for p in reference.model.parameters()]  # the masters, in fp32
    start = zero.start_of(run)
    found = [zero.relative_distance(converted(directory, run), delivered, start)]
    straight = zero.engine_of(run)
    zero.train_engine(straight, run)
    expected = zero.weights_of(straight, run)
    for one in (engine, resumed):
        zero.train_engine(one, run, range(3, zero.STEPS))
        found.append(zero.relative_distance(zero.weights_of(one, run), expected, start))
    return found


def follow(engine: Any, recorder: Recorder, reference: Reference, run: ZeroRun, steps: range) -> None:
    for step in steps:
        zero.train_engine(engine, run, range(step, step + 1))
        reference.follow(recorder.gradients)


RUNS = [
    *((name, stage, {}) for stage in (1, 2, 3) for name in ("schedule_free_adamw", "galore_adamw")),
    ("schedule_free_adamw", 2, BF16),
    ("schedule_free_adamw", 3, BF16),
    ("adalomo", 2, {}),
]


def run_of(name: str, stage: int, config: dict[str, Any]) -> ZeroRun:
    return ZeroRun(name, OPTIMIZERS.get(name, {"lr": 1e-2}), stage, config=config, real_batches=True)


@pytest.mark.parametrize(("name", "stage", "config"), RUNS)
def test_zero_to_fp32_finds_the_delivered_weights_and_training_goes_on(
    name: str, stage: int, config: dict[str, Any], two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks.run(distances_of_checkpoint, run_of(name, stage, config), str(tmp_path)) == [[0.0] * 3] * 2


def distances_without_averaging(run: ZeroRun, directory: str) -> list[float]:
    hold = zero_optimizer.hold_averaged_weights
    zero_optimizer.hold_averaged_weights = lambda engine, optimizer: None
    try:
        return distances_of_checkpoint(run, directory)
    finally:
        zero_optimizer.hold_averaged_weights = hold


@pytest.mark.parametrize("stage", [2, 3])
def test_training_weights_in_the_checkpoint_are_seen(stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    run = run_of("schedule_free_adamw", stage, {})
    for exported, *others in two_ranks.run(distances_without_averaging, run, str(tmp_path)):
        assert exported > 1e-2 and others == [0.0, 0.0]


def test_weights_are_put_back_to_the_bit() -> None:
    """Schedule-free's own way there and back rounds: what is set aside must be copies."""
    first = torch.rand(1000) + 0.1
    average = torch.rand(1000)
    there = first.lerp(average, 1 - 1 / 0.9)
    assert not torch.equal(there.lerp(average, 1 - 0.9), first)
