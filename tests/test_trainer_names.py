"""Every name of transformers' enumeration: trained as transformers trains it, or answered with what to take instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from end_to_end import make_llama
from torch import nn
from trainers import Blocks, Job, Outcome, arguments_of, fresh_accelerate, gap_between, train
from transformers.training_args import OptimizerNames

import dist_optim
from dist_optim.errors import DistOptimError, HyperparameterError, MissingPackageError
from dist_optim.integrations.transformers import Trainer, TrainingArguments
from dist_optim.integrations.transformers.names import ALIASES, INSTEAD, meaning_of
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

UNREGISTERED = [member.value for member in OptimizerNames if member.value not in dist_optim.names()]
"""What transformers alone knows, or knows by another name; `test_trainer_stock.py` has the others."""
TWO_STEPS = {"max_steps": 2, "weight_decay": 0.01}


def outcome(name: str, strategy: str, directory: Path, kind: Any, arguments: Any) -> Outcome | Exception:
    try:
        return train(Job(name, TWO_STEPS, kind=kind), strategy, directory, arguments)
    except Exception as error:
        return error


def test_the_names_are_there() -> None:
    assert len(UNREGISTERED) > 10 and not set(ALIASES) - set(UNREGISTERED)
    known = {member.value for member in OptimizerNames} | set(dist_optim.names())
    for name, instead in INSTEAD.items():
        assert name in UNREGISTERED and instead.split()[0].strip(",") in known


@pytest.mark.parametrize("name", UNREGISTERED)
def test_one_process_is_transformers_own_trainer(name: str, tmp_path: Path) -> None:
    ours = outcome(name, "alone", tmp_path / "ours", Trainer, TrainingArguments)
    stock = outcome(name, "alone", tmp_path / "stock", transformers.Trainer, transformers.TrainingArguments)
    if isinstance(stock, Outcome):
        assert isinstance(ours, Outcome), ours
        assert gap_between(ours, stock) == 0
    else:
        assert isinstance(ours, (MissingPackageError, ValueError)) and f"Or take {INSTEAD[name]}" in str(ours)


def every_name(directory: str, strategy: str) -> None:
    problems = []
    for name in UNREGISTERED:
        found = outcome(name, strategy, Path(directory) / name, Trainer, TrainingArguments)
        if isinstance(found, Outcome):
            alike = outcome(name, "ddp", Path(directory) / f"{name}-ddp", Trainer, TrainingArguments)
            if not isinstance(alike, Outcome) or gap_between(found, alike) != 0:
                problems.append(f"{name}: {alike}")
        elif not isinstance(found, DistOptimError) or INSTEAD.get(name, "?") not in str(found):
            problems.append(f"{name}: {found!r}")
    assert_no_problems_on_any_rank(problems)


def test_sharded_every_name_is_served_or_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(every_name, str(tmp_path), "fsdp2")


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "adamw_8bit", "lion_32bit", "rmsprop_bnb", "grokadamw"])
def test_class_and_keywords_are_transformers_own(name: str, tmp_path: Path) -> None:
    with fresh_accelerate():
        arguments = arguments_of(Job(name), "alone", tmp_path)
        chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        stock, defaults = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert chosen == stock and stock == chosen and {stock: 1}[chosen] == 1
    assert defaults == {key: keywords[key] for key in defaults}


def test_what_the_name_fixes_stays(tmp_path: Path) -> None:
    with fresh_accelerate():
        arguments = arguments_of(Job("adamw_bnb_8bit"), "alone", tmp_path)
        chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        weight = nn.Parameter(torch.ones(2))
        chosen([weight], **keywords)
        with pytest.raises(HyperparameterError, match="is_paged=False by its name"):
            chosen([weight], **{**keywords, "is_paged": True})
        wrong = arguments_of(Job("lion_32bit", {"optim_args": "optim_bits=8"}), "alone", tmp_path)
        with pytest.raises(HyperparameterError, match="set optim='lion_8bit'"):
            Trainer(make_llama(), wrong, train_dataset=Blocks()).create_optimizer()


def test_a_missing_package_is_an_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with fresh_accelerate():
        for name in ("adamw_8bit", "paged_lion_8bit", "ademamix"):
            assert meaning_of(name) is not None or name in UNREGISTERED
            with pytest.raises(ImportError):
                Trainer.get_optimizer_cls_and_kwargs(arguments_of(Job(name), "alone", tmp_path))
