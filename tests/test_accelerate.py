"""`integrations.accelerate.prepare` under DDP, FSDP1 and FSDP2: the loop around the optimizer, and what is refused."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerated import Distance, Training, distances, make_model, started_by_accelerate, through_accelerate
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate import prepare
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

STRATEGIES = ("ddp", "fsdp1", "fsdp2")
GALORE = {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3, "scale": 0.25}
ADAMW = Training("adamw_torch", {"lr": 1e-2, "weight_decay": 0.01}, steps=3)

LOOPS = {
    "schedule-free, evaluation every 2 steps": Training("schedule_free_adamw", {"lr": 1e-2}, evaluate_every=2),
    "galore, clipping that binds": Training("galore_adamw", GALORE, clip=0.5),
    "galore, accumulation 2 and clipping": Training("galore_adamw", GALORE, clip=0.5, accumulation=2),
}


def problems_of(name: str, found: dict[str, Distance]) -> list[str]:
    problems = []
    for strategy, one in found.items():
        if not 0 < one.weights_floor < 1e-3:
            problems.append(f"{name}: a floor of {one.weights_floor} is no rounding noise, and would hide anything")
        if one.weights > 2 * one.weights_floor or one.evaluations > 2 * one.evaluations_floor + 1e-6:
            problems.append(f"{name}, {strategy}: {one}")
    return problems


def loop_equals_one_process(name: str) -> None:
    assert_no_problems_on_any_rank(problems_of(name, distances(LOOPS[name], STRATEGIES)))


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_stays_within_the_noise_floor_of_one_process(name: str, two_ranks: RankPool) -> None:
    two_ranks.run(loop_equals_one_process, name)


def offloaded_differs_by() -> float:
    """FSDP2 with parameters in the host's memory against FSDP2 without, with clipping and accumulation."""
    training = LOOPS["galore, accumulation 2 and clipping"]
    offloaded = replace(training, settings={"FSDP_OFFLOAD_PARAMS": "true"})
    pairs = zip(
        through_accelerate(training, "fsdp2").weights, through_accelerate(offloaded, "fsdp2").weights, strict=True
    )
    return max((a - b).abs().max().item() for a, b in pairs)


def test_offloaded_fsdp2_is_the_same_run(two_ranks: RankPool) -> None:
    assert max(two_ranks.run(offloaded_differs_by)) == 0


def offload_policies_of_what_was_prepared() -> set[str]:
    with started_by_accelerate("fsdp2", replace(ADAMW, settings={"FSDP_OFFLOAD_PARAMS": "true"})) as accelerator:
        model, _, _ = prepare(accelerator, make_model(ADAMW), "sgd", lr=0.1, print_audit=False)
        units = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
        return {type(group.offload_policy).__name__ for unit in units for group in unit._fsdp_param_groups}


def test_offloading_asked_for_is_what_fsdp2_does(two_ranks: RankPool) -> None:
    assert two_ranks.run(offload_policies_of_what_was_prepared) == [{"CPUOffloadPolicy"}] * 2


def hsdp_equals_one_process() -> None:
    training = replace(LOOPS["schedule-free, evaluation every 2 steps"], name="galore_adamw", options=GALORE)
    assert_no_problems_on_any_rank(problems_of("galore, evaluation every 2 steps", distances(training, ["hsdp"])))


def test_hsdp_of_accelerate_stays_within_the_noise_floor_of_one_process(four_ranks: RankPool) -> None:
    four_ranks.run(hsdp_equals_one_process)


def evaluate_without_resharding(strategy: str) -> float:
    guard = "dist_optim.stepping.parameter_guard.reshard_units"
    with mock.patch(guard, lambda units: None):
        found = distances(LOOPS["schedule-free, evaluation every 2 steps"], [strategy])[strategy]
    return found.weights / found.weights_floor


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_control_without_resharding_after_an_evaluation_training_goes_astray(
    strategy: str, two_ranks: RankPool
) -> None:
    assert min(two_ranks.run(evaluate_without_resharding, strategy)) > 100


def compare_with_stock(training: Training) -> None:
    """torch's own AdamW in accelerate's usual order sees the same gradients: equal bit for bit, whatever the engine."""
    problems = []
    for strategy in STRATEGIES:
        ours = through_accelerate(training, strategy)
        stock = through_accelerate(training, strategy, stock=torch.optim.AdamW)
        gap = max((a - b).abs().max().item() for a, b in zip(ours.weights, stock.weights, strict=True))
        if gap or any(weight.dtype != torch.float32 for weight in ours.weights):
            problems.append(f"{strategy}: {gap:.2e} from stock AdamW, {ours.weights[0].dtype}")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize(
    "training",
    [
        replace(ADAMW, mixed_precision="bf16", clip=0.1, accumulation=2),
        replace(ADAMW, is_tied=True, clip=0.1),
    ],
    ids=["bf16", "tied embeddings"],
)
def test_adamw_equals_accelerates_own_way_bit_for_bit(training: Training, two_ranks: RankPool) -> None:
    two_ranks.run(compare_with_stock, training)


def compare_with_recomputed() -> None:
    plain = Training("galore_adamw", GALORE, steps=4)
    recomputed = replace(plain, settings={"FSDP_ACTIVATION_CHECKPOINTING": "true"})
    problems = []
    for strategy in ("fsdp1", "fsdp2"):
        pairs = zip(
            through_accelerate(plain, strategy).weights, through_accelerate(recomputed, strategy).weights, strict=True
        )
        gap = max((a - b).abs().max().item() for a, b in pairs)
        problems += [f"{strategy}: {gap:.2e} apart"] if gap else []
    assert_no_problems_on_any_rank(problems)


def test_activation_checkpointing_of_accelerate_changes_nothing(two_ranks: RankPool) -> None:
    two_ranks.run(compare_with_recomputed)


def what_prepare_makes(strategy: str) -> tuple[str, int, set[str], int]:
    with started_by_accelerate(strategy) as accelerator:
        model, optimizer, _ = prepare(accelerator, make_model(ADAMW), "adamw_torch", lr=0.1, print_audit=False)
        sharded = sum(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())
        held = {id(p) for p in model.parameters()}
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in listed} == held
        state = accelerator.get_state_dict(model)
        return (
            accelerator.distributed_type.value,
            sharded,
            {type(o).__name__ for o in accelerator._optimizers},
            len(state),
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_asked_for_is_what_trains(strategy: str, two_ranks: RankPool) -> None:
    first, second = two_ranks.run(what_prepare_makes, strategy)
    kind, num_units, optimizers, num_tensors = first
    assert kind == ("MULTI_CPU" if strategy == "ddp" else "FSDP")
    assert num_units >= (0 if strategy == "ddp" else 3)  # the root and two layers
    assert optimizers == {"AcceleratedOptimizer"}
    assert num_tensors == 21
    assert second[:3] == first[:3]


def refusal(strategy: str, settings: dict[str, str], optimizer: Any = "sgd") -> str:
    training = replace(ADAMW, settings=settings)
    with started_by_accelerate(strategy, training) as accelerator:
        model = make_model(training)
        with pytest.raises(DistOptimError) as caught:
            prepare(accelerator, model, model_optimizer(model) if optimizer is None else optimizer, lr=0.1)
        assert not accelerator._models, "refused before the model was touched"
    return str(caught.value)


def refusal_without_cpu() -> str:
    with started_by_accelerate("ddp", ADAMW, cpu=False) as accelerator:
        assert accelerator.num_processes == 1
        with pytest.raises(DistOptimError) as caught:
            prepare(accelerator, make_model(ADAMW), "sgd", lr=0.1)
        assert not accelerator._models
    return str(caught.value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a plain Accelerator() finds the ranks' devices")
def test_ranks_that_accelerate_takes_for_jobs_of_their_own_are_told(two_ranks: RankPool) -> None:
    for text in two_ranks.run(refusal_without_cpu):
        assert "asked for 2 ranks" in text and "Accelerator(cpu=True)" in text


FOUR_RANKS = {
    **{"ACCELERATE_USE_PARALLELISM_CONFIG": cpu_rehearsal.SET_ASIDE, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
    **{"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
}
"""As ``fsdp_arguments`` leaves the launcher's mesh."""


def model_optimizer(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("strategy", "settings", "optimizer", "message"),
    [
        ("fsdp1", {"FSDP_USE_ORIG_PARAMS": "false"}, "sgd", "fsdp_use_orig_params: true"),
        ("fsdp1", {"FSDP_OFFLOAD_PARAMS": "true"}, "sgd", "fsdp_offload_params: false"),
        ("fsdp2", FOUR_RANKS, "sgd", r"asks for 4 ranks \(2 x 2 x 1\), and 2 were started"),
        ("ddp", {"ACCELERATE_USE_DEEPSPEED": "true"}, "sgd", "DeepSpeed was asked for"),
        ("fsdp2", {}, None, "instance of SGD.*'sgd', lr="),
        ("fsdp2", {}, "sdg", "sgd"),
    ],
)
def test_what_cannot_be_served_is_refused_on_all_ranks(
    strategy: str, settings: dict[str, str], optimizer: str | None, message: str, two_ranks: RankPool
) -> None:
    for text in two_ranks.run(refusal, strategy, settings, optimizer):
        assert re.search(message, text), text


def prepare_with_a_plugin_of_the_script() -> tuple[str, bool]:
    """accelerate loses the plugin on the CPU, and keeps only the wish for FSDP in the environment."""
    with started_by_accelerate("ddp") as accelerator, mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"}):
        model = make_model(ADAMW)
        with pytest.raises(DistOptimError) as caught:
            prepare(accelerator, model, "sgd", lr=0.1)
        cpu_rehearsal.turn_fsdp_on(accelerator, FullyShardedDataParallelPlugin(fsdp_version=2))
        model, _, _ = prepare(accelerator, model, "sgd", lr=0.1, print_audit=False)
        return str(caught.value), isinstance(model, FSDPModule)


def test_a_plugin_that_accelerate_dropped_is_asked_for(two_ranks: RankPool) -> None:
    for message, is_fsdp2 in two_ranks.run(prepare_with_a_plugin_of_the_script):
        assert "turn_fsdp_on(accelerator, fsdp_plugin)" in message
        assert is_fsdp2


def prepare_alone() -> str:
    """As ``python script.py`` with FSDP asked for: no launcher has named any ranks."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        with started_by_accelerate("fsdp2") as accelerator, pytest.raises(DistOptimError) as caught:
            prepare(accelerator, make_model(ADAMW), "sgd", lr=0.1)
    return str(caught.value)


def test_fsdp_asked_for_in_one_cpu_process_is_refused(one_rank: RankPool) -> None:
    (message,) = one_rank.run(prepare_alone)
    assert "configs/accelerate/fsdp2_cpu_2.yaml" in message


def test_a_rehearsal_of_something_else_fails() -> None:
    with pytest.raises(RuntimeError, match="came back from accelerate without it"):
        cpu_rehearsal.assert_fsdp(nn.Linear(2, 2))


def step_an_optimizer_that_accelerate_took() -> str:
    """accelerate's FSDP2 takes a model with its optimizer, and exchanges the optimizer's parameters for new ones."""
    with started_by_accelerate("fsdp2") as accelerator:
        cpu_rehearsal.turn_fsdp_on(accelerator)
        model = make_model(ADAMW)
        built = dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
        model, optimizer = accelerator.prepare(model, built)
        with pytest.raises(DistOptimError) as caught:
            optimizer.step()
    return str(caught.value)


def test_an_optimizer_built_before_fsdp2_is_refused_at_its_first_step(two_ranks: RankPool) -> None:
    for text in two_ranks.run(step_an_optimizer_that_accelerate_took):
        assert "is no longer the model's" in text and "integrations.accelerate.prepare" in text
