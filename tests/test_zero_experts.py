"""Under DeepSpeed too each expert of a stack is a matrix of its own: equal to one process, and to upstream itself."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zero
from end_to_end import VOCABULARY
from galore_torch import GaLoreAdamW
from mesh_doors import make_moe
from test_zero import BF16
from torch import Tensor, nn
from zero import Recorder, ZeroRun

import dist_optim
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

LOW_RANK: dict[str, Any] = {"rank": 4, "update_proj_gap": 2, "scale": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "galore_adamw": {"lr": 1e-2, "target_modules": "all-linear", **LOW_RANK},
    "apollo_adamw": {"lr": 1e-2, "target_modules": "all-linear", **LOW_RANK},
    "muon": {"lr": 1e-2, "weight_decay": 0.1, "rest_options": {"weight_decay": 0.0}},
}


def run_of(name: str, stage: int, **more: Any) -> ZeroRun:
    wanted = "dist_optim.muon" if name == "muon" else name
    return ZeroRun(wanted, OPTIONS[name], stage, make_model=make_moe, **more)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_expert_is_stepped_as_in_one_process(name: str, stage: int, two_ranks: RankPool) -> None:
    assert two_ranks.run(zero.distance_given_gradients, run_of(name, stage)) == [0.0, 0.0]


@pytest.mark.parametrize(
    "more",
    [
        {"stage": 2},
        {"stage": 3, "zero": {"sub_group_size": 9000}},
        {"stage": 1, "config": BF16},
        {"stage": 3, "init": True},
    ],
    ids=str,
)
def test_cuts_inside_of_experts(more: dict[str, Any], three_ranks: RankPool) -> None:
    assert three_ranks.run(zero.distance_given_gradients, run_of("galore_adamw", **more)) == [0.0, 0.0, 0.0]


def distance_after_our_own(run: ZeroRun, folder: str) -> float:
    """Saved by name under this stage, gone on with under another one, whose cuts are elsewhere."""
    straight, first = zero.engine_of(run), zero.engine_of(run)
    zero.train_engine(straight, run)
    zero.train_engine(first, run, range(3))
    dist_optim.save_checkpoint(folder, first, first.optimizer)
    other = replace(run, stage=2)
    second = zero.engine_of(other)
    dist_optim.load_checkpoint(folder, second, second.optimizer)
    zero.train_engine(second, other, range(3, zero.STEPS))
    return zero.relative_distance(zero.weights_of(second, other), zero.weights_of(straight, run), zero.start_of(run))


def test_state_goes_from_stage_to_stage_by_name(two_ranks: RankPool, tmp_path: Any) -> None:
    run = run_of("galore_adamw", 1)
    assert two_ranks.run(distance_after_our_own, run, str(tmp_path)) == [0.0, 0.0]


def verified(run: ZeroRun) -> tuple[bool, int, bool]:
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(3))
    steps: Any = engine.basic_optimizer.verified_steps
    return steps.is_over, steps.num_compared, steps.difference is None


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_first_steps_are_verified(stage: int, two_ranks: RankPool) -> None:
    run = run_of("galore_adamw", stage)
    run = replace(run, options={**run.options, "verify_steps": 2})
    assert two_ranks.run(verified, run)[0] == (True, 2, True)


class Filtered(nn.Module):
    """A convolution over the positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.conv = nn.Conv1d(24, 20, 3, padding=1)
        self.head = nn.Linear(20, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        hidden = self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_filters_are_one_matrix_to_muon(stage: int, two_ranks: RankPool) -> None:
    groups = [{"params": "conv.weight", "optim": "muon"}, {"params": "*", "optim": "adamw_torch"}]
    run = ZeroRun("dist_optim.muon", {"lr": 1e-2, "params": groups}, stage, make_model=Filtered)
    assert two_ranks.run(zero.distance_given_gradients, run) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_goes_on(stage: int, two_ranks: RankPool, tmp_path: Any) -> None:
    assert two_ranks.run(zero.distance_after_resume, run_of("galore_adamw", stage), str(tmp_path)) == [0.0, 0.0]


def distance_from_upstream(run: ZeroRun) -> float:
    """From the unmodified class on each expert as a parameter of its own, given the engine's gradients."""
    engine, model = zero.engine_of(run), make_moe()
    recorder, kinds = Recorder(engine), dict(model.named_modules())
    leaves = {
        name: [nn.Parameter(one.detach().clone()) for one in (full if full.ndim == 3 else [full])]
        for name, full in model.named_parameters()
    }
    is_low = {
        name: full.ndim == 3 or isinstance(kinds[name.rpartition(".")[0]], nn.Linear)
        for name, full in model.named_parameters()
    }
    assert sum(len(own) > 1 for own in leaves.values()) == 4, "stacks of experts"
    groups: list[dict[str, Any]] = [
        {"params": [one for name, own in leaves.items() if is_low[name] == low for one in own], **more}
        for low, more in ((False, {}), (True, {**LOW_RANK, "proj_type": "std"}))
    ]
    upstream = GaLoreAdamW(groups, lr=1e-2)
    for step in range(zero.STEPS):
        zero.train_engine(engine, run, range(step, step + 1))
        for name, own in leaves.items():
            gradient = recorder.gradients[name]
            for at, one in enumerate(own):
                one.grad = None if gradient is None else (gradient[at] if len(own) > 1 else gradient).clone()
        upstream.step()
    expected = [torch.stack(list(own)) if len(own) > 1 else own[0] for own in leaves.values()]
    found = zero.weights_of(engine, run)
    return zero.relative_distance(found, [one.detach() for one in expected], zero.start_of(run))


@pytest.mark.parametrize("stage", [2, 3])
def test_equals_upstream_on_separate_parameters(stage: int, two_ranks: RankPool) -> None:
    assert two_ranks.run(distance_from_upstream, run_of("galore_adamw", stage)) == [0.0, 0.0]
