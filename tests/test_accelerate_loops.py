"""accelerate: groups made before ``prepare``, several models in one accelerator, and calls around a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerated import Training, make_model, prepare_stock, started_by_accelerate
from placements import full_parameters
from resuming import train_steps
from situations_accelerate import Counter
from torch import nn

from dist_optim.errors import DistOptimError
from dist_optim.integrations.accelerate import following, prepare
from dist_optim.ranks.agreement import gather_objects
from dist_optim.testing import RankFailure, RankPool, assert_equal

ADAMW = Training("adamw_torch", {"lr": 1e-2})
STRATEGIES = ("ddp", "fsdp2")
QUIET: dict[str, Any] = {"lr": 1e-2, "print_audit": False}


class NoSchedule:
    def step(self) -> None:
        pass


def halves(model: nn.Module, kind: str = "list") -> list[dict[str, Any]]:
    """Matrices, and the rest at another rate; of the model as it is now."""
    named = list(model.named_parameters())
    matrices, rest = ([(n, p) for n, p in named if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    if kind == "list":
        return [{"params": [p for _, p in matrices]}, {"params": [p for _, p in rest], "lr": 1e-3}]
    return [{"params": iter(matrices)}, {"params": iter(rest), "lr": 1e-3}]  # named, and read once


# Groups of the plain model ----------------------------------------------------------------------------------------


def groups_follow(strategy: str) -> None:
    """Against torch's own AdamW with the same groups, which sees the same gradients: equal to the bit."""
    found = []
    for kind in ("stock", "list", "named", "two optimizers"):
        with started_by_accelerate(strategy, ADAMW) as accelerator:
            model = make_model(ADAMW)
            optimizers: list[Any]
            groups = halves(model, "named" if kind == "named" else "list")
            if kind == "stock":
                model, *optimizers = prepare_groups_of_stock(accelerator, model, groups)
            elif kind == "two optimizers":
                model, first, _ = prepare(accelerator, model, "adamw_torch", params=groups[0]["params"], **QUIET)
                model, second, _ = prepare(accelerator, model, "adamw_torch", params=groups[1:], **QUIET)
                optimizers = [first, second]
            else:
                model, *optimizers, _ = prepare(accelerator, model, "adamw_torch", params=groups, **QUIET)
            for step in range(2):
                train_steps(accelerator, model, Together(optimizers), NoSchedule(), range(step, step + 1))
            found.append(full_parameters(model))
    for ours in found[1:]:
        assert_equal(ours, found[0])


def prepare_groups_of_stock(
    accelerator: Accelerator, model: nn.Module, groups: list[dict[str, Any]]
) -> tuple[nn.Module, Any]:
    kind = lambda _, **options: torch.optim.AdamW(groups, **options)  # noqa: E731  in the place of a class
    return prepare_stock(accelerator, model, kind, {"lr": 1e-2, "weight_decay": 0.0})  # type: ignore[arg-type]


class Together:
    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self) -> None:
        for one in self.optimizers:
            one.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_groups_of_the_plain_model_follow_their_parameters(strategy: str, two_ranks: RankPool) -> None:
    two_ranks.run(groups_follow, strategy)


def groups_stay_behind() -> None:
    with mock.patch.object(following, "_successor_of", lambda parameter: parameter):
        groups_follow("fsdp2")


def test_control_groups_that_stay_behind_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="not a parameter of the model"):
        two_ranks.run(groups_stay_behind)


# Two models, hooks, registered objects ----------------------------------------------------------------------------


@contextmanager
def two_prepared(strategy: str) -> Iterator[tuple[Accelerator, list[nn.Module], list[Any]]]:
    with started_by_accelerate(strategy, ADAMW) as accelerator:
        first, one, _ = prepare(accelerator, make_model(ADAMW), "adamw_torch", **QUIET)
        second, other, _ = prepare(accelerator, make_model(ADAMW), "schedule_free_adamw", **QUIET)
        yield accelerator, [first, second], [one, other]


def two_models_are_saved_with_what_goes_with_them(strategy: str, directory: Path) -> None:
    """They are trained in turns; the second run resumes with hooks and a counter, and ends as the first."""
    seen: list[str] = []

    def train(accelerator: Accelerator, models: list[nn.Module], optimizers: list[Any], steps: range) -> None:
        for step in steps:
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.train()
                train_steps(accelerator, model, optimizer, NoSchedule(), range(step, step + 1))

    with two_prepared(strategy) as (accelerator, models, optimizers):
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: seen.append(f"saved {len(models)}"))
        train(accelerator, models, optimizers, range(2))
        counter.value = 2
        accelerator.save_state(str(directory))
        train(accelerator, models, optimizers, range(2, 4))
        expected = [full_parameters(model) for model in models]
    with two_prepared(strategy) as (accelerator, models, optimizers):
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        accelerator.register_load_state_pre_hook(lambda models, folder: seen.append("loaded"))
        train(accelerator, models, optimizers, range(7, 8))
        accelerator.load_state(str(directory))
        assert counter.value == 2 and seen == ["saved 2", "loaded"], (counter.value, seen)
        train(accelerator, models, optimizers, range(2, 4))
        for model, weights in zip(models, expected, strict=True):
            assert_equal(full_parameters(model), weights)
        accelerator.free_memory()
        assert not accelerator._optimizers
        model, optimizer, _ = prepare(accelerator, make_model(ADAMW), "adamw_torch", **QUIET)
        accelerator.save_state(str(directory))  # of what is left: the freed ones are forgotten
        gather_objects(None)
        assert (directory / "dist_optim").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_models_are_saved_with_what_goes_with_them(strategy: str, two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(two_models_are_saved_with_what_goes_with_them, strategy, tmp_path / "state")


# What is refused --------------------------------------------------------------------------------------------------


def refused(call: Callable[[], Any]) -> str:
    """What all ranks raise; they raise it in the same call."""
    text = "nothing was raised"
    try:
        call()
    except DistOptimError as error:
        text = f"{type(error).__name__}: {error}"
    (same,) = {re.sub(r"\[from rank \d+\] ", "", one) for one in gather_objects(text)}
    return same


def refusals_of_prepare(strategy: str) -> dict[str, str]:
    with started_by_accelerate(strategy, ADAMW) as accelerator:
        model = make_model(ADAMW)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(sgd)
        calls: dict[str, tuple[Any, ...]] = {
            "no accelerator": (None, model, "sgd"),
            "in stock order": (model, sgd, schedule),
            "no model": (accelerator, None, "sgd"),
            "parameters": (accelerator, model.parameters(), "sgd"),
            "stock optimizer": (accelerator, model, sgd),
            "wrapped optimizer": (accelerator, model, AcceleratedLike(sgd)),
        }
        found = {name: refused(partial(prepare, *given, **QUIET)) for name, given in calls.items()}
        schedules: dict[str, dict[str, Any]] = {
            "built schedule": {"scheduler": schedule},
            "number for a schedule": {"scheduler": 3},
            "options for nothing": {"scheduler": None, "scheduler_options": {"factor": 0.5}},
            "options in a list": {"scheduler": "linear", "scheduler_options": [1]},
            "other arguments": {"lr": 0.1 * (1 + torch.distributed.get_rank())},
        }
        for name, given in schedules.items():
            found[name] = refused(partial(prepare, accelerator, model, "sgd", **{**QUIET, **given}))
        assert not accelerator._models, "refused before the model was touched"
        prepared, optimizer, _ = prepare(accelerator, model, "sgd", **QUIET)
        if strategy == "ddp":
            found["prepared before"] = refused(lambda: prepare(accelerator, model, "sgd", **QUIET))
        found["schedule that fails"] = refused(
            lambda: prepare(accelerator, prepared, "sgd", scheduler=no_schedule, **QUIET)
        )
        found["registered"] = refused(lambda: accelerator.register_for_checkpointing(optimizer))
        found["uneven"] = refused(lambda: accelerator.join_uneven_inputs([prepared], even_batches=False))
        with accelerator.join_uneven_inputs([prepared]):  # even ones are served: nothing joins
            train_steps(accelerator, prepared, optimizer, NoSchedule(), range(1))
        return found


def no_schedule(optimizer: Any) -> Any:
    raise KeyError("x")


class AcceleratedLike(torch.optim.Optimizer):
    """As accelerate's wrapper: an optimizer with another one inside."""

    __module__ = "accelerate.optimizer"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


MESSAGES = {
    "no accelerator": "ParameterError: prepare takes accelerate's Accelerator first, and was given None",
    "in stock order": "ParameterError: prepare takes accelerate's Accelerator first",
    "no model": r"ParameterError: The model is missing: .*was given None. Pass prepare\(accelerator, model, name",
    "parameters": r"ParameterError: The model is missing: .*a generator .*prepare\(accelerator, model, name, params=",
    "stock optimizer": "ParameterError: optimizer is an instance of SGD, built already.*'sgd', lr=",
    "wrapped optimizer": "ParameterError: optimizer is an instance of SGD, built already.*'sgd', lr=",
    "built schedule": "ScheduleError: scheduler is ConstantLR built already.*scheduler=lambda optimizer",
    "number for a schedule": "ScheduleError: scheduler=3 is no schedule",
    "options for nothing": "ScheduleError: scheduler_options=.* would reach no schedule",
    "options in a list": r"ScheduleError: scheduler_options=\[1\] is no dict",
    "other arguments": r"RanksDisagreeError: .*: lr is 0.1 on rank 0 and 0.2 on rank 1",
    "prepared before": "ParameterError: This model was prepared before",
    "schedule that fails": "ScheduleError: .*failed with KeyError: 'x'. Check the function",
    "registered": "UnsupportedError: sgd was given to register_for_checkpointing.*save_state",
    "uneven": "UnsupportedError: sgd: join_uneven_inputs lets ranks stop at different steps.*drop_last",
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_that_cannot_be_served_are_refused_on_all_ranks(strategy: str, two_ranks: RankPool) -> None:
    found, _ = two_ranks.run(refusals_of_prepare, strategy)
    assert found.keys() == MESSAGES.keys() - ({"prepared before"} if strategy == "fsdp2" else set())
    for name, text in found.items():
        assert re.match(MESSAGES[name], text, flags=re.DOTALL), f"{name}: {text}"
