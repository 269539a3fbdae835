"""Through real forward, backward and reduction: as close to one process as another order of summation comes."""

from __future__ import annotations

import pytest
from end_to_end import Run, distance_and_floor

from dist_optim.testing import RankPool

GALORE = {"target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3, "scale": 0.25}
RUNS = [
    Run("galore_adamw", {"lr": 1e-2, "weight_decay": 0.01, **GALORE}),
    Run("galore_adamw", {"lr": 1e-2, "weight_decay": 0.01, **GALORE}, clip=0.5),
    Run("adamw_torch", {"lr": 1e-2, "weight_decay": 0.01}),
    Run("sgd", {"lr": 1e-1, "momentum": 0.9}),
]


def check(pool: RankPool, run: Run, placement: str) -> None:
    for distance, floor in pool.run(distance_and_floor, run, placement):
        assert 0 < floor < 1e-3, "a floor that is no rounding noise would hide anything"
        assert distance <= 2 * floor, f"{distance:.2e} from one process; the noise floor is {floor:.2e}"


@pytest.mark.parametrize("placement", ["ddp", "fsdp2"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}{' clipped' if run.clip else ''}")
def test_stays_within_the_noise_floor_of_one_process(run: Run, placement: str, two_ranks: RankPool) -> None:
    check(two_ranks, run, placement)


def test_stays_within_the_noise_floor_on_three_ranks(three_ranks: RankPool) -> None:
    check(three_ranks, RUNS[0], "ddp")
