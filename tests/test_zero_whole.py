"""What needs every gradient at once, under an engine that shows one param group, or sub-group, after another."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zero
from any_runs import Choice, Reference, reference_of_engine, run_under_zero
from test_zero import BF16, FP16
from zero import NO_DECAY, ZeroRun

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.integrations.deepspeed.gathered_calls import GatheredCalls
from dist_optim.ranks.agreement import own_rank
from dist_optim.specs.registry import Trait
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

OPTIONS: dict[str, dict[str, Any]] = {
    "prodigy": {"lr": 1.0, "d0": 1e-3, "weight_decay": 0.05, "no_decay": NO_DECAY},
    "kron": {"lr": 1e-2, "weight_decay": 0.05, "no_decay": NO_DECAY},
    "adalomo": {"lr": 1e-2, "weight_decay": 0.05, "no_decay": NO_DECAY, "clip_grad_norm": 0.5},
    "dist_optim.muon": {"lr": 1e-2, "rest": "prodigy", "rest_options": {"lr": 1.0, "d0": 1e-3}},
}
SUB_GROUPS = {"sub_group_size": 9000}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("prodigy", dict(stage=1, config=BF16)),
    ("kron", dict(stage=2)),
    ("prodigy", dict(stage=2, config=BF16, zero=OFFLOADED)),
    ("prodigy", dict(stage=2, config=FP16)),
    ("kron", dict(stage=3, zero=SUB_GROUPS, config={"gradient_clipping": 0.1})),
    ("prodigy", dict(stage=3, zero={**SUB_GROUPS, **OFFLOADED}, config=BF16)),
    ("prodigy", dict(stage=3, zero={**SUB_GROUPS, "stage3_param_persistence_threshold": 0}, init=True)),
    ("adalomo", dict(stage=2, config=BF16)),
    ("adalomo", dict(stage=3, zero=SUB_GROUPS)),
    ("dist_optim.muon", dict(stage=2, config=BF16)),
]


def run_of(name: str, **more: Any) -> ZeroRun:
    return ZeroRun(name, OPTIONS[name], real_batches=True, **more)


@pytest.mark.parametrize(("name", "more"), RUNS)
def test_equals_one_process(name: str, more: dict[str, Any], two_ranks: RankPool) -> None:
    assert two_ranks.run(zero.distance_given_gradients, run_of(name, **more)) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [2, 3])
def test_equals_itself_on_one_rank(stage: int, one_rank: RankPool) -> None:
    assert one_rank.run(zero.distance_given_gradients, run_of("prodigy", stage=stage, zero=SUB_GROUPS)) == [0.0]


@pytest.mark.parametrize(("stage", "config"), [(1, BF16), (2, {}), (3, {})])
def test_resumes_through_the_engine(stage: int, config: dict[str, Any], two_ranks: RankPool, tmp_path: Path) -> None:
    run = run_of("prodigy", stage=stage, config=config, zero=SUB_GROUPS)
    assert two_ranks.run(zero.distance_after_resume, run, str(tmp_path)) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_layer_without_gradient_is_left_alone(stage: int, two_ranks: RankPool) -> None:
    options = {**OPTIONS["prodigy"], "no_decay": ["embed.weight", "idle.bias", "never.bias", "head.bias"]}
    run = ZeroRun("prodigy", options, stage, {"sub_group_size": 600}, {}, True, zero.SometimesIdle)
    assert two_ranks.run(zero.distance, run) == [0.0, 0.0]


def test_one_rank_holds_all_state(two_ranks: RankPool) -> None:
    (first, total), (second, _) = two_ranks.run(zero.bytes_of_state, run_of("prodigy", stage=2))
    assert (first, second) == (total, 0)


# Classes without a name here ---------------------------------------------------------------------------------------


class Anchored(torch.optim.Optimizer):
    """Divides by the norm of all gradients, pulls towards the weights it started from, and lowers its own rate."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.anchors = [one.detach().clone() for group in self.param_groups for one in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [(one, group) for group in self.param_groups for one in group["params"]]
        norm = sum(float(one.grad.square().sum()) for one, _ in every if one.grad is not None) ** 0.5
        for (one, group), anchor in zip(every, self.anchors, strict=True):
            if one.grad is not None:
                one.sub_(group["lr"] * (one.grad / norm + 0.1 * (one - anchor)))
        for group in self.param_groups:
            group["lr"] *= 0.9


def problems_of(choice: Choice, stage: int, directory: str, **more: Any) -> list[str]:
    expected: Reference = reference_of_engine(choice, has_two_groups=True)
    problems, part = run_under_zero(choice, expected, stage, directory, has_two_groups=True, **more)
    return problems + ([] if part.holdings.division.is_together else ["it was not stepped together"])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("choice", [Choice("test_zero_whole", "Anchored"), Choice("pytorch_optimizer", "DAdaptAdam")])
def test_an_undescribed_class_saved_and_loaded(choice: Choice, stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip(choice.module)
    assert two_ranks.run(problems_of, choice, stage, str(tmp_path), sub_group_size=10) == [[], []]


# Weights for evaluation --------------------------------------------------------------------------------------------


def swapping_together(body: Callable[..., Any], stage: int, *more: Any) -> Any:
    """The body with a schedule-free optimizer whose tensors are said to depend on each other."""
    spec = dist_optim.get_spec("schedule_free_adamw")
    if "swaps_together" not in dist_optim.names():
        traits = (spec.traits - {Trait.ELEMENTWISE}) | {Trait.WHOLE_TENSOR, Trait.COUPLED}
        dist_optim.register(replace(spec, name="swaps_together", traits=traits))
    options = {"lr": 1e-2, "weight_decay": 0.01, "warmup_steps": 3, "no_decay": NO_DECAY}
    return body(ZeroRun("swaps_together", options, stage, SUB_GROUPS, BF16, real_batches=True), *more)


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluation_weights_reach_the_model_and_are_saved(stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(swapping_together, zero.distances_of_evaluation, stage) == [[0.0] * 4] * 2
    resumed = two_ranks.run(swapping_together, zero.distance_after_resume, stage, str(tmp_path))
    assert resumed == [0.0, 0.0]


# What fails --------------------------------------------------------------------------------------------------------


def after_a_failed_step(run: ZeroRun, directory: str) -> tuple[list[str], bool]:
    """What the third step and saving raise when upstream fails; whether all weights are those of the second."""
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(2))
    optimizer, said = engine.basic_optimizer, []
    before = [*zero.weights_of(engine, run), *optimizer.copied_weights()[0].values()]
    (part,) = optimizer.parts()
    if own_rank() == 0:
        (instance,) = part.holdings.instances
        instance.optimizer.step = mock.Mock(side_effect=MemoryError("no room"))
    for act in (lambda: zero.train_engine(engine, run, range(2, 3)), lambda: engine.save_checkpoint(directory)):
        try:
            act()
        except DistOptimError as error:
            said.append(f"{type(error).__name__}: {error}")
    after = [*zero.weights_of(engine, run), *optimizer.copied_weights()[0].values()]
    return said, all(map(torch.equal, before, after))


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_is_written_by_a_step_that_fails(stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    run = run_of("prodigy", stage=stage, config=BF16, zero=SUB_GROUPS)
    for (step, save), is_unchanged in two_ranks.run(after_a_failed_step, run, str(tmp_path)):
        assert "StepFailedError" in step and "step 3 failed on rank 0 with MemoryError: no room" in step
        assert "Step 3 failed" in save and is_unchanged


# Negative controls -------------------------------------------------------------------------------------------------


def distance_without(what: str, run: ZeroRun) -> float:
    def keep_without_copying(self: GatheredCalls, number: int) -> bool:
        return number < len(self._earlier)

    instead: Any = {"write_model": lambda self: None, "keep_gradients": keep_without_copying}[what]
    with mock.patch.object(GatheredCalls, what, instead):
        return zero.distance(run)


@pytest.mark.parametrize("what", ["write_model", "keep_gradients"])
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_or_gradients_of_earlier_calls_that_are_lost_are_seen(
    what: str, stage: int, two_ranks: RankPool
) -> None:
    run = run_of("prodigy", stage=stage, zero=SUB_GROUPS)
    assert two_ranks.run(zero.distance, run) == [0.0, 0.0]
    assert min(two_ranks.run(distance_without, what, run)) > 1e-3
