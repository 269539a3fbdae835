"""Save in the middle, resume in a new Trainer: the steps that follow are those of the uninterrupted run, to the bit."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from end_to_end import make_llama
from placements import full_parameters
from safetensors.torch import load_file
from trainers import STRATEGIES, ZERO, Blocks, Job, Outcome, arguments_of, fresh_accelerate, gap_between, train
from transformers.trainer_utils import get_last_checkpoint

from dist_optim.checkpoint import save_optimizer
from dist_optim.errors import CheckpointError
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.checkpoint import CheckpointingMixin
from dist_optim.integrations.transformers.history import checkpoints_in
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

SAVING = {"save_strategy": "steps", "save_steps": 3}
BEST_OF_TWO = {
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "learning_rate": 0.05,
}
SCHEDULED = {**SAVING, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "weight_decay": 0.1}


def resume_equals_uninterrupted(name: str, strategies: list[str], directory: str) -> None:
    job = Job(name, SCHEDULED)
    problems = []
    for strategy in strategies:
        first, second = Path(directory) / strategy / "first", Path(directory) / strategy / "second"
        whole = train(job, strategy, first)
        resumed = train(replace(job, resume=str(first / "checkpoint-3")), strategy, second)
        if gap_between(whole, resumed):
            problems.append(f"{strategy}: {gap_between(whole, resumed):.2e} apart after resuming")
        if whole.all("loss")[3:] != resumed.all("loss")[3:] or len(resumed.all("loss")) != 6:
            problems.append(f"{strategy}: losses {whole.all('loss')[3:]} and {resumed.all('loss')[3:]}")
        if [path.name for path in first.iterdir() if path.name.startswith(".")]:
            problems.append(f"{strategy}: unfinished folders are left")
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize(
    ("name", "strategies"),
    [
        ("adamw_torch", ["zero2", "fsdp1"]),
        ("galore_adamw", ["fsdp1", "zero3"]),
        ("apollo_adamw", ["ddp"]),
        ("adafactor", ["fsdp2"]),
        ("grokadamw", ["fsdp2"]),
        ("schedule_free_adamw", ["fsdp1", "zero2"]),
        ("adamw_bnb_8bit", ["ddp"]),
        ("flash_adamw", ["fsdp2"]),
        ("stable_adamw", ["fsdp2", "zero1"]),
        ("adalomo", ["ddp", "zero2"]),
    ],
)
def test_resumed_training_is_the_uninterrupted_one(
    name: str, strategies: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(resume_equals_uninterrupted, name, strategies, str(tmp_path))


SHARDS = STRATEGIES["fsdp2"]["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}
IN_PIECES = ZERO | {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}}
"""ZeRO-3 that must not gather weights to save them."""


def trained_under(strategy: str, job: Job, folder: Path) -> Outcome:
    """``zero3 pieces`` and ``fsdp2 shards``: the weights of a checkpoint are nowhere whole."""
    if strategy == "zero3 pieces":
        with mock.patch("trainers.load_file", lambda path: {}):
            return train(job, "zero3", folder, deepspeed=IN_PIECES)
    if strategy == "fsdp2 shards":
        with mock.patch("trainers.load_file", lambda path: {}):
            return train(job, "fsdp2", folder, fsdp_config=SHARDS)
    return train(job, strategy, folder)


def saves_for_others(name: str, saving: str, directory: str) -> None:
    """Three steps and a checkpoint."""
    trained_under(saving, Job(name, {**SCHEDULED, "max_steps": 3}), Path(directory) / saving)
    written = {path.name for path in (Path(directory) / saving / "checkpoint-3").iterdir()}
    problems = [f"DeepSpeed's own files: {one}" for one in written if one.startswith("global_step")]
    in_pieces = {"zero3 pieces": "dist_optim_weights", "fsdp2 shards": "pytorch_model_fsdp_0"}
    if in_pieces.get(saving, "model.safetensors") not in written:
        problems.append(f"no weights: {sorted(written)}")
    assert_no_problems_on_any_rank(problems)


def stands_where_it_was_saved(name: str, saving: str, opening: str, directory: str) -> dict[str, torch.Tensor]:
    """Opened at its last step, which is not repeated: what it then exports."""
    job = Job(name, {**SCHEDULED, "max_steps": 3}, resume=str(Path(directory) / saving / "checkpoint-3"))
    return trained_under(opening, job, Path(directory) / f"{saving} in {opening}").weights


EVERY = ["ddp", "fsdp1", "fsdp2", "fsdp2 shards", "zero0", "zero2", "zero3", "zero3 pieces"]


@pytest.mark.parametrize("saving", EVERY)
def test_a_checkpoint_opens_under_any_strategy_and_its_last_step_is_not_repeated(
    saving: str, two_ranks: RankPool, one_rank: RankPool, tmp_path: Path
) -> None:
    name = "galore_adamw"
    two_ranks.run(saves_for_others, name, saving, str(tmp_path))
    found = {"alone": one_rank.run(stands_where_it_was_saved, name, saving, "alone", str(tmp_path))[0]}
    for opening in ("ddp", "zero2") if EVERY.index(saving) % 2 else ("fsdp2", "zero3"):
        found[opening] = two_ranks.run(stands_where_it_was_saved, name, saving, opening, str(tmp_path))[0]
    differing = [
        f"{saving} opened under {opening}: {key} is another"
        for opening, weights in found.items()
        for key, weight in found["alone"].items()
        if not torch.equal(weight, weights[key])
    ]
    assert not differing


def resume_without_state(directory: str) -> float:
    job, folder = Job("galore_adamw", SCHEDULED), Path(directory)
    whole = train(job, "fsdp2", folder / "first")
    with mock.patch("dist_optim.integrations.transformers.checkpoint.load_optimizer"):
        resumed = train(replace(job, resume=str(folder / "first" / "checkpoint-3")), "fsdp2", folder / "second")
    return gap_between(whole, resumed)


def test_control_without_the_optimizers_state_the_run_is_another(two_ranks: RankPool, tmp_path: Path) -> None:
    assert min(two_ranks.run(resume_without_state, str(tmp_path))) > 1e-4


def saved_weights(directory: str) -> list[tuple[float, float]]:
    """How far a saved checkpoint is from the averaged and from the training weights."""
    found = []
    for strategy in ("ddp", "fsdp1", "fsdp2"):
        settings = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
        with fresh_accelerate():
            job = Job("schedule_free_adamw", settings)
            torch.manual_seed(0)
            arguments = arguments_of(job, strategy, Path(directory) / strategy)
            trainer = Trainer(make_llama(), arguments, train_dataset=Blocks(), eval_dataset=Blocks(1))
            trainer.train()
            saved = load_file(Path(directory) / strategy / "checkpoint-6" / "model.safetensors")
            averaged = {name: full.clone() for name, full in full_parameters(trainer.model).items()}
            trainer.optimizer.train()
            training = full_parameters(trainer.model)
            gaps = [max((saved[n] - w[n]).abs().max().item() for n in saved) for w in (averaged, training)]
            found.append((gaps[0], gaps[1]))
    return found


def test_a_checkpoint_holds_the_averaged_weights(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(saved_weights, str(tmp_path)):
        assert [averaged for averaged, _ in found] == [0, 0, 0] and min(training for _, training in found) > 1e-4


def best_and_limit(strategy: str, directory: str) -> None:
    settings = {**SAVING, **BEST_OF_TWO, "per_device_eval_batch_size": 6}
    folder = Path(directory) / strategy
    run = train(Job("schedule_free_adamw", settings), strategy, folder)
    losses = run.all("eval_loss")
    best = losses.index(min(losses)) + 1
    kept = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert len(kept) == 2 and {best, 6} <= {*kept, 6} and best in kept, (losses, kept)
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{best}")
    saved = load_file(folder / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(saved[name], run.weights[name]) for name in saved), "the best model is what is exported"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_best_model_is_kept_and_loaded(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(best_and_limit, strategy, str(tmp_path))


def killed_while_saving(directory: str) -> None:
    """A job that dies in its second save: the first checkpoint is the last one, and resuming starts there."""
    job, folder = Job("galore_adamw", {**SCHEDULED, "save_steps": 2}), Path(directory)
    whole = train(job, "ddp", folder / "whole")
    name = "dist_optim.integrations.transformers.checkpoint.save_optimizer"
    with mock.patch(name, dies_in_call(2)), pytest.raises(KeyboardInterrupt):
        train(job, "ddp", folder / "killed")
    assert get_last_checkpoint(str(folder / "killed")) == str(folder / "killed" / "checkpoint-2")
    resumed = train(replace(job, resume=True), "ddp", folder / "killed")
    assert gap_between(whole, resumed) == 0
    assert not list((folder / "killed").glob(".*"))


def dies_in_call(number: int) -> Callable[..., None]:
    calls = iter(range(1, number + 1))

    def save(*positional: Any) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        save_optimizer(*positional)

    return save


def test_a_job_killed_while_saving_resumes_from_the_checkpoint_before(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(killed_while_saving, str(tmp_path))


def goes_back(strategy: str, directory: str) -> None:
    """Two steps, four, six, and from the second on again: what is then the latest, and what a limit leaves."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    folder, job = Path(directory), Job("adamw_torch", saving)
    train(job, strategy, folder)
    back = replace(job, resume=str(folder / "checkpoint-2"), settings=saving | {"learning_rate": 1e-3, "max_steps": 4})
    changed: dict[str, Any] = {"allow_changed": "lr"}
    branch = train(back, strategy, folder, save_total_limit=2, **changed)
    names = [path.name for path in checkpoints_in(folder)]
    at_the_end = replace(back, resume=True)
    problems = [] if names == ["checkpoint-6", "checkpoint-4"] else [f"left: {names}"]
    if gap_between(train(at_the_end, strategy, folder, **changed), branch):
        problems.append("not the branch that was trained last")
    assert_no_problems_on_any_rank(problems)


def test_last_and_the_limit_go_by_the_runs_own_history(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(goes_back, "ddp", str(tmp_path))


PIECES = {
    "the model": ("transformers.Trainer._save", 0),
    "the optimizer": ("torch.distributed.checkpoint.filesystem._write_item", 1),
    "the schedule": ("torch.optim.lr_scheduler.LambdaLR.state_dict", 0),
    "the generators": ("transformers.Trainer._save_rng_state", 1),
    "the scaler": ("transformers.Trainer._save_scaler", 0),
    "the state": ("transformers.TrainerState.save_to_json", 0),
    "the limit": ("dist_optim.integrations.transformers.checkpoint.remove_older", 0),
}
"""What a checkpoint is made of, and the rank that fails at it."""


def save_that_fails_on_one_rank(piece: str, directory: str) -> None:
    (name, rank), folder, problems = PIECES[piece], Path(directory), ["no error"]
    job = Job("galore_adamw", {**SCHEDULED, "max_steps": 1, "save_steps": 1})
    try:
        with mock.patch(name, fails_on(rank, pkgutil.resolve_name(name))):
            train(job, "ddp", folder)
    except CheckpointError as error:
        problems = [] if "read-only" in str(error) else [str(error)]
    dist.barrier()
    left = [path.name for path in folder.iterdir()] if folder.exists() else []
    problems += [f"left {left}"] if left != (["checkpoint-1"] if piece == "the limit" else []) else []
    assert_no_problems_on_any_rank(problems)


def fails_on(rank: int, original: Callable[..., Any]) -> Callable[..., Any]:
    def act(*positional: Any, **named: Any) -> Any:
        if dist.get_rank() == rank:
            raise OSError("read-only file system")
        return original(*positional, **named)

    return act


@pytest.mark.parametrize("piece", PIECES)
def test_a_save_that_fails_on_one_rank_ends_all_of_them(piece: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """None of the ranks waits for another, and no half of a checkpoint is left."""
    two_ranks.run(save_that_fails_on_one_rank, piece, str(tmp_path))


def test_a_checkpoint_of_transformers_own_trainer_is_refused(tmp_path: Path) -> None:
    job = Job("adamw_torch", SAVING)
    train(replace(job, kind=transformers.Trainer), "alone", tmp_path / "stock", transformers.TrainingArguments)
    with pytest.raises(CheckpointError, match="saved without dist_optim"):
        train(replace(job, resume=str(tmp_path / "stock" / "checkpoint-3")), "alone", tmp_path / "ours")


def test_deepspeeds_own_optimizer_does_not_resume_from_weights_alone() -> None:
    """Its masters would keep the weights of before, and write them over what was loaded."""
    trainer: Any = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(CheckpointError, match="Train with the optimizer that saved it"):
        CheckpointingMixin._resume_under_deepspeed(trainer, "checkpoint-1")
