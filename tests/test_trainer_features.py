"""What transformers' Trainer does besides optimizers: in one process it ends as with the stock Trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from end_to_end import make_llama
from torch import Tensor
from trainers import Blocks, Job, arguments_of, fresh_accelerate
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from dist_optim.integrations.transformers import Trainer, TrainingArguments

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
TIMED = ("runtime", "per_second")


class Search:
    """In the place of a package that chooses hyperparameters: these, one run for each; the best one is kept."""

    name = "wandb"  # the backend whose trials are plain dicts
    rates = (1e-2, 1e-3)

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Any, n_trials: int, direction: str, **options: Any) -> BestRun:
        found = []
        for number, rate in enumerate(self.rates[:n_trials]):
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial={"learning_rate": rate, "seed": number})
            loss = trainer.compute_objective(trainer.evaluate())
            found.append(BestRun(str(number), loss, {"learning_rate": rate}))
        return min(found, key=lambda run: float(run.objective))


@dataclass(frozen=True)
class Feature:
    """What is set, and what is done with the Trainer."""

    settings: dict[str, Any]
    act: Callable[[Any], Any] = lambda trainer: trainer.train() and None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: dict[str, Any] = field(default_factory=dict)
    """More of the Trainer's own."""


def search(trainer: Any) -> Any:
    return trainer.hyperparameter_search(hp_space=dict, n_trials=2, direction="minimize", backend="wandb")


@contextmanager
def with_search() -> Iterator[None]:
    backends = mock.patch.dict(ALL_HYPERPARAMETER_SEARCH_BACKENDS, {HPSearchBackend.WANDB: Search})
    installed = mock.patch("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    package = mock.patch.dict(sys.modules, wandb=mock.Mock(run=mock.Mock(id="trial")))
    with backends, installed, package:
        yield


class Hub:
    """Notes what is pushed: which files, and how large, when the push begins."""

    def __init__(self) -> None:
        self.pushed: list[Any] = []

    def create_repo(self, name: str, **options: Any) -> Any:
        return mock.Mock(repo_id=name)

    def upload_folder(self, *, folder_path: str, commit_message: str, **options: Any) -> Any:
        files = sorted(path for path in Path(folder_path).iterdir() if path.is_file())
        weights = [path.stat().st_size for path in files if path.suffix == ".safetensors"]
        self.pushed.append((commit_message, options.get("path_in_repo"), [path.name for path in files], weights))
        return mock.Mock(is_done=lambda: True, done=lambda: True)


def with_hub() -> AbstractContextManager[Any]:
    hub = Hub()
    return mock.patch("transformers.trainer.hf_api", lambda: hub)


def train_and_push(trainer: Any) -> Any:
    trainer.train()
    trainer.push_to_hub()
    hub = transformers.trainer.hf_api()
    # Beside stock's files a checkpoint of ours may have its own, and it has no optimizer.pt.
    return [
        (message, path, [name for name in names if name not in ("optimizer.pt", "dist_optim_save.json")], weights)
        for message, path, names, weights in hub.pushed
    ]


FEATURES: dict[str, Feature] = {
    "hyperparameter search": Feature(
        {"eval_strategy": "epoch"}, search, with_search, {"model": None, "model_init": make_llama}
    ),
    "the best is saved": Feature(
        {**EVALUATED, "save_strategy": "best", "metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    ),
    "gradient checkpointing": Feature({"gradient_checkpointing": True}),
    "gradient checkpointing, reentrant": Feature(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    "torch_compile, eager": Feature({"torch_compile": True, "torch_compile_backend": "eager"}),
    "torch_compile, aot_eager": Feature({"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "pushed to the hub": Feature(
        {"push_to_hub": True, "hub_model_id": "someone/something", "hub_strategy": "checkpoint", "save_steps": 3}
        | {"save_strategy": "steps"},
        train_and_push,
        with_hub,
    ),
}


@dataclass(frozen=True)
class End:
    """What is compared."""

    returned: Any
    weights: dict[str, Tensor]
    state: dict[str, Any]
    folders: list[str]


def end_of(feature: Feature, directory: Path, is_stock: bool) -> End:
    kind, arguments = (
        (transformers.Trainer, transformers.TrainingArguments) if is_stock else (Trainer, TrainingArguments)
    )
    with fresh_accelerate(), feature.around():
        torch.manual_seed(0)
        settings = arguments_of(Job("adamw_torch", feature.settings), "alone", directory, arguments)
        options = {"model": make_llama(), **feature.options}
        trainer: Any = kind(args=settings, train_dataset=Blocks(), eval_dataset=Blocks(1, start=1000), **options)
        returned = feature.act(trainer)
        return End(
            returned,
            {name.removeprefix("_orig_mod."): one.detach().clone() for name, one in trainer.model.named_parameters()},
            comparable(trainer.state, directory),
            sorted(path.name for path in directory.iterdir() if path.is_dir()),
        )


def comparable(state: Any, directory: Path) -> dict[str, Any]:
    """Without times, and with paths as they are below the run's folder."""
    logs = [
        {key: value for key, value in log.items() if not any(one in key for one in TIMED)} for log in state.log_history
    ]
    best = state.best_model_checkpoint and str(Path(state.best_model_checkpoint).relative_to(directory))
    return {
        "logs": logs,
        "steps": (state.global_step, state.max_steps, state.epoch),
        "best": (state.best_metric, state.best_global_step, best),
        "trial": (state.trial_params, state.is_hyper_param_search),
    }


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_ends_as_with_the_stock_trainer(name: str, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "stock").mkdir()
    ours, stock = (end_of(FEATURES[name], tmp_path / kind, kind == "stock") for kind in ("ours", "stock"))
    assert ours.returned == stock.returned
    assert ours.state == stock.state and ours.state["steps"][0] > 0
    assert ours.folders == stock.folders
    assert ours.weights.keys() == stock.weights.keys()
    assert max((one - stock.weights[key]).abs().max().item() for key, one in ours.weights.items()) == 0
    start = dict(make_llama().named_parameters())
    assert not any(torch.equal(one, start[key]) for key, one in ours.weights.items()), "it was trained"


def test_control_what_the_features_do_is_seen(tmp_path: Path) -> None:
    """The search has tried two rates and kept one, the best checkpoint is there, and pushes hold whole weights."""
    ends = {name: end_of(FEATURES[name], tmp_path, False) for name in ("hyperparameter search", "pushed to the hub")}
    best = ends["hyperparameter search"].returned
    assert best.hyperparameters["learning_rate"] in Search.rates and math.isfinite(best.objective)
    pushes = ends["pushed to the hub"].returned
    assert [path for _, path, *_ in pushes].count("last-checkpoint") == 2 and len(pushes) > 2
    assert all(sizes and min(sizes) > 400_000 for *_, sizes in pushes)
