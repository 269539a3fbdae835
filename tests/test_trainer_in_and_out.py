"""Between transformers' own Trainer and ours, both ways, in the middle of a run: the end is the uninterrupted one's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainers import Job, Outcome, gap_between, train

from dist_optim.checkpoint import export, import_, inspect
from dist_optim.errors import DistOptimError
from dist_optim.stepping.whole_state import memory_order

SCHEDULED = {
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
}
AVERAGING = ("schedule_free_adamw",)
"""Ours ends with the averaged weights, and the stock Trainer with those of training."""
LOW_RANK = {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=8, update_proj_gap=3"}


def stock(job: Job, directory: Path) -> Outcome:
    return train(replace(job, kind=transformers.Trainer), "alone", directory, transformers.TrainingArguments)


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "schedule_free_adamw"])
def test_a_run_of_the_stock_trainer_goes_on_in_ours(name: str, tmp_path: Path) -> None:
    job = Job(name, SCHEDULED)
    whole = stock(job, tmp_path / "stock")
    import_(tmp_path / "stock" / "checkpoint-3", tmp_path / "ours", optim=name)
    assert inspect(tmp_path / "ours").is_sound
    resumed = train(replace(job, resume=str(tmp_path / "ours")), "alone", tmp_path / "resumed")
    assert name in AVERAGING or gap_between(whole, resumed) == 0.0
    assert whole.all("loss")[3:] == resumed.all("loss")[3:]


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "schedule_free_adamw"])
def test_a_run_of_ours_goes_on_in_the_stock_trainer(name: str, tmp_path: Path) -> None:
    job = Job(name, SCHEDULED)
    whole = train(job, "alone", tmp_path / "ours")
    done = export(tmp_path / "ours" / "checkpoint-3", tmp_path / "out")
    assert "config.json" in done.files
    folder = next((tmp_path / "out").glob("**/optimizer.pt")).parent
    resumed = stock(replace(job, resume=str(folder)), tmp_path / "resumed")
    assert name in AVERAGING or gap_between(whole, resumed) == 0.0
    assert whole.all("loss")[3:] == resumed.all("loss")[3:]


def test_low_rank_groups_are_found_by_their_layers(tmp_path: Path) -> None:
    """transformers puts matrices into a group of their own; the state is theirs, to the bit."""
    stock(Job("galore_adamw", {**SCHEDULED, **LOW_RANK, "max_steps": 3}), tmp_path / "stock")
    source = tmp_path / "stock" / "checkpoint-3"
    with pytest.raises(DistOptimError, match="--optim_target_modules"):
        import_(source, tmp_path / "ours", optim="galore_adamw")
    import_(source, tmp_path / "ours", optim="galore_adamw", target_modules=["attn", "mlp"])
    export(tmp_path / "ours", tmp_path / "out")
    theirs, again = (opened(folder / "optimizer.pt") for folder in (source, tmp_path / "out"))
    assert theirs["param_groups"] == again["param_groups"]
    for number, own in theirs["state"].items():
        assert torch.equal(own["exp_avg"], again["state"][number]["exp_avg"])
        if "projector" in own:
            bases = [one["projector"].ortho_matrix for one in (own, again["state"][number])]
            assert torch.equal(*bases) and memory_order(bases[0]) == memory_order(bases[1])


def opened(path: Path) -> Any:
    from galore_torch.galore_projector import GaLoreProjector

    with torch.serialization.safe_globals([GaLoreProjector]):
        return torch.load(path, weights_only=True)
