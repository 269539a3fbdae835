"""``accelerator.save_state`` and ``load_state`` after ``prepare``: the resumed run is the run that went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerated import Training
from resuming import gap_after_resume

from dist_optim.testing import RankFailure, RankPool

GALORE = {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3, "scale": 0.25}
RUNS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"lr": 1e-2},
    "galore_adamw": GALORE,
    "schedule_free_adamw": {"lr": 1e-2},
    "grokadamw": {"lr": 1e-2},
    "adafactor": {"lr": 1e-2},
}


def resume(name: str, strategy: str, directory: Path) -> None:
    assert gap_after_resume(Training(name, RUNS[name]), strategy, directory) == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    name: str, strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resume, name, strategy, tmp_path / "state")


def resume_by_accelerate_alone(name: str, strategy: str, directory: Path) -> None:
    with mock.patch("dist_optim.integrations.accelerate.placing.serve_state"):
        resume(name, strategy, directory)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_control_accelerates_own_way_loses_the_state(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        two_ranks.run(resume_by_accelerate_alone, "galore_adamw", strategy, tmp_path / "state")
