"""Who makes the Trainer's optimizer, and when: names, classes, overridden methods, prebuilt ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from end_to_end import make_llama
from torch import nn
from trainers import Blocks, Job, arguments_of, fresh_accelerate, gap_between, train

import dist_optim
from dist_optim.errors import DistOptimError, ParameterError, WrongModeError
from dist_optim.integrations.transformers import DistOptimTrainerMixin, Trainer
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

STRATEGIES = ["ddp", "fsdp1", "fsdp2", "zero2"]


class AddsAGroup:
    """As transformers' guide has it: super(), then a group of one's own. Without the ``model`` that FSDP1 passes."""

    model: Any
    optimizer: Any

    def create_optimizer(self) -> Any:
        super().create_optimizer()  # type: ignore[misc]
        head = next(p for name, p in self.model.named_parameters() if "lm_head" in name)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not head]
        self.optimizer.add_param_group({"params": [head], "lr": 3e-2})
        return self.optimizer


class TwoRates(AddsAGroup, Trainer):  # type: ignore[misc]  # as people write it: without ``model``
    pass


class StockTwoRates(AddsAGroup, transformers.Trainer):
    pass


class MakesItsGroups:
    """As many scripts have it: the class and its keywords from the arguments, the groups from here."""

    args: Any
    model: Any
    optimizer: Any
    get_optimizer_cls_and_kwargs: Any
    get_decay_parameter_names: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        chosen = self.model if model is None else model
        kind, keywords = self.get_optimizer_cls_and_kwargs(self.args, chosen)
        decays = set(self.get_decay_parameter_names(chosen))
        named = [(name, p) for name, p in chosen.named_parameters() if "lm_head" not in name]
        head = next(p for name, p in chosen.named_parameters() if "lm_head" in name)
        groups = [
            {"params": [p for name, p in named if name in decays]},
            {"params": [p for name, p in named if name not in decays]},
            {"params": [head], "lr": 3e-2},
        ]
        self.optimizer = kind(groups, **keywords)
        return self.optimizer


class TwoRatesOfItsOwn(MakesItsGroups, Trainer):
    pass


class StockTwoRatesOfItsOwn(MakesItsGroups, transformers.Trainer):
    pass


def two_rates_are_the_same_everywhere(directory: str) -> None:
    job, problems = Job("adafactor", kind=TwoRates), []
    plain = train(replace(job, kind=Trainer), "ddp", Path(directory) / "plain")
    runs = {strategy: train(job, strategy, Path(directory) / strategy) for strategy in STRATEGIES}
    runs["own class"] = train(replace(job, kind=TwoRatesOfItsOwn), "fsdp2", Path(directory) / "own")
    for name, run in runs.items():
        if gap_between(run, plain) < 1e-3 or gap_between(run, runs["ddp"]) > 1e-4:
            problems.append(
                f"{name}: {gap_between(run, plain)} from one rate, {gap_between(run, runs['ddp'])} from ddp"
            )
    assert_no_problems_on_any_rank(problems)


def test_added_groups_are_trained_alike_under_every_strategy(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(two_rates_are_the_same_everywhere, str(tmp_path))


@pytest.mark.parametrize(("kind", "stock"), [(TwoRates, StockTwoRates), (TwoRatesOfItsOwn, StockTwoRatesOfItsOwn)])
def test_added_groups_are_transformers_own_in_one_process(kind: type[Any], stock: type[Any], tmp_path: Path) -> None:
    ours = train(Job("adamw_torch", kind=kind), "alone", tmp_path / "ours")
    theirs = train(Job("adamw_torch", kind=stock), "alone", tmp_path / "stock", transformers.TrainingArguments)
    assert gap_between(ours, theirs) == 0


def test_a_class_and_its_keywords(tmp_path: Path) -> None:
    chosen = (torch.optim.NAdam, {"lr": 1e-2, "momentum_decay": 1e-3})
    job = Job("adamw_torch", {"weight_decay": 0.1}, options={"optimizer_cls_and_kwargs": chosen})
    ours = train(job, "alone", tmp_path / "ours")
    stock = train(replace(job, kind=transformers.Trainer), "alone", tmp_path / "s", transformers.TrainingArguments)
    assert gap_between(ours, stock) == 0


def class_under_fsdp2(directory: str) -> None:
    from galore_torch import GaLoreAdamW

    settings = {"optim_target_modules": ["attn", "mlp"]}
    chosen = (GaLoreAdamW, {"lr": 1e-2, "rank": 8, "update_proj_gap": 3, "scale": 0.25})
    by_class = Job("adamw_torch", settings, options={"optimizer_cls_and_kwargs": chosen})
    one = train(by_class, "fsdp2", Path(directory) / "class")
    other = train(Job("galore_adamw"), "fsdp2", Path(directory) / "name")
    assert gap_between(one, other) == 0


def test_a_registered_class_is_its_name(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(class_under_fsdp2, str(tmp_path))


def test_a_prebuilt_optimizer_is_trained(tmp_path: Path) -> None:
    with fresh_accelerate():
        torch.manual_seed(0)
        model, arguments = make_llama(), arguments_of(Job("adamw_torch"), "alone", tmp_path)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        Trainer(model, arguments, train_dataset=Blocks(), optimizers=(optimizer, None)).train()
        trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    named = train(Job("adamw_torch"), "alone", tmp_path / "named")
    assert all(torch.equal(trained[name], named.weights[name]) for name in trained)


def prebuilt(kind: str, model: nn.Module) -> tuple[Any, Any]:
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    stranger = torch.optim.SGD(make_llama().parameters(), lr=0.1)
    if kind == "stale":
        return stranger, None
    if kind == "schedule of another":
        return own, torch.optim.lr_scheduler.ConstantLR(stranger)
    if kind == "schedule alone":
        return None, torch.optim.lr_scheduler.ConstantLR(stranger)
    own.state[next(model.parameters())]["momentum_buffer"] = torch.zeros(3, device="meta")
    return own, None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stale", "not a parameter of the model"),
        ("schedule of another", "drives another optimizer"),
        ("schedule alone", "drives another optimizer"),
        ("misplaced", "is on meta, and the parameter on cpu"),
    ],
)
def test_a_prebuilt_optimizer_is_checked(kind: str, message: str, tmp_path: Path) -> None:
    with fresh_accelerate():
        model = make_llama()
        trainer = Trainer(
            model,
            arguments_of(Job("sgd"), "alone", tmp_path),
            train_dataset=Blocks(),
            optimizers=prebuilt(kind, model),
        )
        with pytest.raises(ParameterError, match=message):
            trainer.train()


class ByHand(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        self.optimizer = transformers.Adafactor((model or self.model).parameters(), lr=1e-2, relative_step=False)
        return self.optimizer


def refusals(directory: str) -> dict[str, str]:
    jobs = {
        "by hand": (Job("adafactor", kind=ByHand), "fsdp2"),
        "transformers' own name": (Job("ademamix_8bit"), "fsdp2"),
        "json and name": (Job("sgd", {"optim_args": "momentum=0.5"}), "json"),
        "prebuilt": (Job("sgd"), "zero2"),
    }
    found = {}
    for name, (job, strategy) in jobs.items():
        with fresh_accelerate():
            model = make_llama()
            arguments = arguments_of(job, "zero2" if strategy == "json" else strategy, directory)
            if strategy == "json":
                arguments.hf_deepspeed_config.config["optimizer"] = {"type": "galore_adamw", "params": {}}
            options = {"optimizers": prebuilt("", model)} if name == "prebuilt" else {}
            trainer = job.kind(model, arguments, train_dataset=Blocks(), **options)
            with pytest.raises(DistOptimError) as caught:
                trainer.train()
            found[name] = str(caught.value)
    return found


def test_what_cannot_be_served_is_refused_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(refusals, str(tmp_path)):
        assert "super().create_optimizer()" in found["by hand"]
        assert "take ademamix instead" in found["transformers' own name"]
        assert "Keep one of the two" in found["json and name"]
        assert "drops a prebuilt SGD under DeepSpeed" in found["prebuilt"]


def test_a_deferred_optimizer_does_not_step(tmp_path: Path) -> None:
    with fresh_accelerate():
        trainer = Trainer(make_llama(), arguments_of(Job("sgd"), "alone", tmp_path), train_dataset=Blocks())
        deferred = trainer.create_optimizer()
        with pytest.raises(WrongModeError, match="train\\(\\) builds it"):
            deferred.step()
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, dist_optim.DistributedOptimizer)
        built = trainer.optimizer
        trainer.train()
        assert trainer.optimizer is built, "a second train() goes on with the same optimizer"


def prepared_by_the_user(directory: str) -> None:
    """Refused by ``prepare`` itself, on all ranks, and not by the first step; ``train()`` is as it was."""
    problems = []
    for strategy in ("ddp", "fsdp1", "fsdp2"):
        with fresh_accelerate():
            arguments = arguments_of(Job("sgd"), strategy, directory)
            trainer = Trainer(make_llama(), arguments, train_dataset=Blocks())
            deferred = trainer.create_optimizer()
            try:
                trainer.accelerator.prepare(trainer.model, deferred)
            except WrongModeError as error:
                if "dist_optim.integrations.accelerate.prepare(" in str(error):
                    continue
            problems.append(f"{strategy}: not refused")
    assert_no_problems_on_any_rank(problems)


def test_a_deferred_optimizer_is_not_prepared_by_others(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(prepared_by_the_user, str(tmp_path))


class OtherTrainer(transformers.Trainer):
    """Stands for the Trainers of other packages: it overrides what they do."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)

    def compute_loss(self, *positional: Any, **named: Any) -> Any:
        return super().compute_loss(*positional, **named)


class Mixed(DistOptimTrainerMixin, OtherTrainer):
    pass


def test_the_mixin_serves_other_trainers(tmp_path: Path) -> None:
    job = Job("flash_adamw", {"save_strategy": "steps", "save_steps": 3})
    assert (
        gap_between(train(replace(job, kind=Mixed), "alone", tmp_path / "a"), train(job, "alone", tmp_path / "b")) == 0
    )
    assert (tmp_path / "a" / "checkpoint-6" / "optimizer").is_dir()


def evaluated_and_trained_twice(directory: str) -> None:
    """`evaluate()` comes before `train()`, and `train()` twice: every strategy ends where the others do."""
    found = {}
    for strategy in ("ddp", "fsdp1", "fsdp2"):
        with fresh_accelerate():
            torch.manual_seed(0)
            arguments = arguments_of(Job("schedule_free_adamw"), strategy, Path(directory) / strategy)
            trainer = Trainer(make_llama(), arguments, train_dataset=Blocks(), eval_dataset=Blocks(1, start=1000))
            losses = [trainer.evaluate()["eval_loss"]]
            for _ in range(2):
                trainer.train()
                losses.append(trainer.evaluate()["eval_loss"])
            found[strategy] = losses
    gaps = [abs(one - other) for run in found.values() for one, other in zip(run, found["ddp"], strict=True)]
    assert max(gaps) < 1e-4 and len(set(found["ddp"])) == 3, found


def test_evaluation_before_training_and_a_second_training(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(evaluated_and_trained_twice, str(tmp_path))
