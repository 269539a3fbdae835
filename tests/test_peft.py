"""Adapters of peft: saved alone, under DeepSpeed too, and resumed under any strategy to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from end_to_end import make_llama
from safetensors.torch import load_file
from test_accelerate_state import prepared_under, train_steps, weights_of
from torch import nn
from trainers import ZERO, Job, Outcome, gap_between, train

from dist_optim.errors import CheckpointError, UnsupportedError
from dist_optim.integrations.transformers.adapters import stored_adapters
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

peft: Any = pytest.importorskip("peft", reason="peft is not installed")

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.5}
MORE: dict[str, dict[str, Any]] = {
    "zero3 pieces": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}},
    "zero2 bf16": {"bf16": True, "deepspeed": {**ZERO, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}},
}
"""ZeRO-3 that was not told to gather weights: adapters are small, and are. And masters of a model in half precision."""


def make_adapted() -> nn.Module:
    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model: nn.Module = peft.get_peft_model(make_llama(), adapters)
    return model


def trained(job: Job, strategy: str, folder: Path) -> Outcome:
    """What the adapters end as."""

    def load(path: Path) -> dict[str, torch.Tensor]:
        return load_file(path.with_name("adapter_model.safetensors"))

    with mock.patch("trainers.load_file", load):
        return train(job, strategy.split()[0], folder, **MORE.get(strategy, {}))


def resumes_under(name: str, saving: str, openings: list[str], directory: Path) -> None:
    job, problems = Job(name, SAVING, make_model=make_adapted), []
    whole = trained(job, saving, directory / "whole")
    checkpoint = directory / "whole" / "checkpoint-3"
    written = {path.name for path in checkpoint.iterdir()}
    if not {"adapter_model.safetensors", "optimizer"} <= written or any("global_step" in one for one in written):
        problems.append(f"written: {sorted(written)}")
    for opening in openings:
        resumed = trained(replace(job, resume=str(checkpoint)), opening, directory / opening)
        at_its_end = replace(job, settings={**SAVING, "max_steps": 3}, resume=str(checkpoint))
        saved = load_file(checkpoint / "adapter_model.safetensors")
        opened = trained(at_its_end, opening, directory / f"{opening} opened").weights
        if any(not torch.equal(saved[key], opened[key]) for key in saved):
            problems.append(f"{opening}: other adapters than were saved")
        allowed = 0 if opening == saving else 1e-6  # gradients are reduced in another order
        if gap_between(whole, resumed) > allowed:
            problems.append(f"{opening}: {gap_between(whole, resumed):.2e} apart")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize(
    ("name", "saving", "openings"),
    [
        ("adamw_torch", "ddp", ["zero2", "zero3"]),
        ("adamw_torch", "zero2", ["zero2", "ddp"]),
        ("adafactor", "zero3", ["zero3", "ddp"]),
        ("schedule_free_adamw", "zero3 pieces", ["zero3 pieces", "zero2"]),
        ("adamw_torch", "zero2 bf16", ["zero2 bf16"]),
    ],
)
def test_adapters_resume_under_any_strategy(
    name: str, saving: str, openings: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resumes_under, name, saving, openings, tmp_path)


def accelerates_state(saving: str, opening: str, folder: Path) -> bool:
    with mock.patch("resuming.make_model", lambda training: make_adapted()):
        with prepared_under(saving, "adamw_torch") as (accelerator, model, optimizer, scheduler):
            train_steps(accelerator, model, optimizer, scheduler, range(3))
            accelerator.save_state(str(folder))
            saved = weights_of(optimizer)
        with prepared_under(opening, "adamw_torch") as (accelerator, _, optimizer, _):
            accelerator.load_state(str(folder))
            opened = weights_of(optimizer)
    return saved.keys() == opened.keys() and all(torch.equal(saved[name], opened[name]) for name in saved)


@pytest.mark.parametrize(("saving", "opening"), [("zero3", "ddp"), ("ddp", "zero2")])
def test_accelerates_states_hold_the_whole_model(
    saving: str, opening: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks.run(accelerates_state, saving, opening, tmp_path / "state") == [True, True]


def resumes_without_a_tensor(directory: Path) -> None:
    job = Job("adamw_torch", {**SAVING, "max_steps": 3}, make_model=make_adapted)
    trained(job, "zero2", directory)

    def without_one(checkpoint: Any, model: Any) -> Any:
        found = stored_adapters(checkpoint, model)
        assert found is not None and found.names is not None
        (path, names), *_ = found.names.items()
        return replace(found, names={path: dict(list(names.items())[1:])})

    door = "dist_optim.integrations.transformers.checkpoint_weights.stored_adapters"
    with mock.patch(door, without_one), pytest.raises(CheckpointError, match=r"no .*lora"):
        trained(replace(job, resume=str(directory / "checkpoint-3")), "zero2", directory / "other")


def test_an_adapter_that_is_not_all_there_is_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(resumes_without_a_tensor, tmp_path)


def make_with_adapters_inside() -> nn.Module:
    torch.manual_seed(0)
    model = make_llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))  # type: ignore[operator]
    return model


def is_not_saved_beside_training(folder: Path) -> None:
    job = Job("adamw_torch", {**SAVING, "asynchronous_saves": True}, make_model=make_with_adapters_inside)
    with pytest.raises(UnsupportedError, match="the engine saves what add_adapter made"):
        train(job, "zero2", folder)
    assert not list(folder.glob("checkpoint-*"))


def test_what_add_adapter_made_is_not_saved_beside_the_training_under_deepspeed(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(is_not_saved_beside_training, tmp_path)
