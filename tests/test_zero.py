"""DeepSpeed ZeRO 0, 1, 2 and 3 by JSON name: the weights of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import zero
from zero import GALORE, NO_DECAY, ZeroRun

from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "galore_adamw": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY, **GALORE},
    "galore_adafactor": {"lr": 1e-2, "no_decay": NO_DECAY, **GALORE},
    "apollo_adamw": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY, **GALORE, "scale": 1.0},
    "adafactor": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "grokadamw": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "stable_adamw": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "schedule_free_adamw": {"lr": 1e-2, "weight_decay": 0.01, "warmup_steps": 3, "no_decay": NO_DECAY},
    "adamw_torch": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "sgd": {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "adamw_bnb_8bit": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "adalomo": {"lr": 1e-2, "weight_decay": 0.01, "no_decay": NO_DECAY},
    "flash_adamw": {"lr": 1e-2, "quantize": False, "fused": False, "master_weight_bits": None, "no_decay": NO_DECAY},
}
OTHERS = [
    *("adafactor", "apollo_adamw", "grokadamw", "schedule_free_adamw", "stable_adamw"),
    *("adamw_bnb_8bit", "adalomo", "flash_adamw", "galore_adafactor"),
]

STEPPED_WHOLE = ["galore_adamw", "apollo_adamw", "grokadamw", "adamw_bnb_8bit"]
BF16 = {"bf16": {"enabled": True}}
NO_MASTER = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}  # the first step overflows
VARIANTS: dict[str, dict[str, Any]] = {
    "round robin 1": dict(stage=1, zero={"round_robin_gradients": True}),
    "round robin 2": dict(stage=2, zero={"round_robin_gradients": True}),
    "alignment": dict(stage=2, zero={"parameter_alignment": True}),
    "overlap": dict(stage=2, zero={"overlap_comm": True, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000}),
    "offload 2": dict(stage=2, zero={"offload_optimizer": {"device": "cpu"}}),
    "offload 3": dict(stage=3, zero={"offload_optimizer": {"device": "cpu"}}),
    "accumulation 2": dict(stage=2, config={"gradient_accumulation_steps": 2}),
    "accumulation 3": dict(stage=3, config={"gradient_accumulation_steps": 2}),
    "clip 0": dict(stage=0, config={"gradient_clipping": 0.1}),
    "clip 2": dict(stage=2, config={"gradient_clipping": 0.1}),
    "clip 3": dict(stage=3, config={"gradient_clipping": 0.1}),
    "bf16 0": dict(stage=0, config=BF16),
    "bf16 1": dict(stage=1, config=BF16),
    "bf16 1, fp32 accumulation": dict(stage=1, config={**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16 2": dict(stage=2, config=BF16),
    "bf16 3": dict(stage=3, config=BF16),
    "bf16 1, no masters": dict(stage=1, config=NO_MASTER),
    "bf16 2, no masters": dict(stage=2, config=NO_MASTER),
    "bf16 3, no masters": dict(stage=3, config=NO_MASTER),
    "fp16 1": dict(stage=1, config=FP16),
    "fp16 2": dict(stage=2, config=FP16),
    "fp16 3": dict(stage=3, config=FP16),
    "sub-groups": dict(stage=3, zero={"sub_group_size": 9000}),
    "nothing persistent": dict(stage=3, zero={"stage3_param_persistence_threshold": 0}),
    "zero.Init": dict(stage=3, init=True),
}


def run_of(name: str, stage: int, **more: Any) -> ZeroRun:
    return ZeroRun(name, OPTIMIZERS[name], stage, **more)


HALF = [(name, stage) for at, name in enumerate(list(OPTIMIZERS)[:10]) for stage in range(4) if (at + stage) % 2]


@pytest.mark.parametrize(("name", "stage"), HALF)  # the others: test_zero_names, and all of them `make parity`
def test_equals_one_process(name: str, stage: int, two_ranks: RankPool) -> None:
    assert two_ranks.run(zero.distance, run_of(name, stage, real_batches=True)) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", STEPPED_WHOLE)
def test_equals_one_process_on_three_ranks(name: str, stage: int, three_ranks: RankPool) -> None:
    run = run_of(name, stage, real_batches=True)
    assert three_ranks.run(zero.distance_given_gradients, run) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_one_process_on_one_rank(stage: int, one_rank: RankPool) -> None:
    """Nothing is divided, and DeepSpeed flattens the parameters all the same."""
    for name in ("galore_adamw", "adafactor"):
        assert one_rank.run(zero.distance_given_gradients, run_of(name, stage, real_batches=True)) == [0.0]


# Every variant with one optimizer, and every second one with GaLore too: all kinds meet most of DeepSpeed's options.
COVERING = [
    (variant, name)
    for at, variant in enumerate(VARIANTS)
    for name in (OTHERS[at % len(OTHERS)], *(["galore_adamw"] if at % 2 == 0 else []))
]


@pytest.mark.parametrize(("variant", "name"), COVERING)
def test_equals_one_process_under(variant: str, name: str, two_ranks: RankPool) -> None:
    run = run_of(name, real_batches=True, **VARIANTS[variant])
    assert two_ranks.run(zero.distance_given_gradients, run) == [0.0, 0.0]


HALVES: dict[str, dict[str, Any]] = {"bf16": BF16, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}}}


@pytest.mark.parametrize(("half", "stage"), [("bf16", 0), *((half, stage) for half in HALVES for stage in (1, 2, 3))])
def test_half_precision_goes_the_same_way(half: str, stage: int, two_ranks: RankPool) -> None:
    """On own gradients: given the engine's, a loss scale that is never applied to the loss would not be seen."""
    run = ZeroRun("sgd", {"lr": 1e-1}, stage, real_batches=True, config=HALVES[half])
    assert max(two_ranks.run(zero.distance, run)) < 0.05


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_weights_reach_the_model(stage: int, two_ranks: RankPool) -> None:
    for found in two_ranks.run(zero.distances_of_evaluation, run_of("schedule_free_adamw", stage)):
        assert found == [0.0] * 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["galore_adamw", "grokadamw", "schedule_free_adamw"])
def test_resumes_through_the_engine(name: str, stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(zero.distance_after_resume, run_of(name, stage), str(tmp_path)) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "grokadamw", "schedule_free_adamw"])
def test_a_layer_without_gradient_is_left_alone(name: str, stage: int, two_ranks: RankPool) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1}
    run = ZeroRun(name, options, stage, real_batches=True, make_model=zero.SometimesIdle)
    assert two_ranks.run(zero.distance, run) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["apollo_adamw", "grokadamw"])
def test_frozen_and_tied_parameters_keep_their_positions(name: str, stage: int, two_ranks: RankPool) -> None:
    run = run_of(name, stage, real_batches=True, make_model=zero.make_frozen_tied)
    assert two_ranks.run(zero.distance_given_gradients, run) == [0.0, 0.0]


@pytest.mark.parametrize("stage", [1, 2])
def test_only_matrices_that_a_boundary_cuts_travel(stage: int, two_ranks: RankPool, three_ranks: RankPool) -> None:
    for pool in (two_ranks, three_ranks):
        for sent, most in pool.run(zero.elements_moved, run_of("galore_adamw", stage)):
            assert 0 < sent <= most


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_divided(stage: int, two_ranks: RankPool) -> None:
    held = two_ranks.run(zero.bytes_of_state, run_of("galore_adamw", stage))
    total = held[0][1]
    assert sum(own for own, _ in held) == pytest.approx(total, rel=0.02)  # step counters are one a slice
    assert max(own for own, _ in held) <= 0.6 * total
