"""``add_param_group`` between steps: the trajectory of upstream with the same call, under every placement."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from any_runs import CASE, weights_of
from parity import Case, full_parameters, gaps_between, gradients, inject, make_model, place, set_learning_rates
from sessions import ENGINES, TorchSession
from situations import compare
from test_checkpoint import BY_NAME
from torch import Tensor, nn
from torch.optim import Optimizer

import dist_optim
from dist_optim.errors import DistOptimError, ParameterError, UnsupportedError
from dist_optim.layouts import detect
from dist_optim.ranks.agreement import own_rank
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.testing import RankFailure, RankPool

GROWING = replace(CASE, steps=8, frozen=())
FIRST, SECOND = 2, 5
"""Steps before which a group is added."""
LATER = (("linears.1.weight", "extra.0"), ("linears.3.weight",))


def adafactor(groups: list[dict[str, Any]]) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, relative_step=False, scale_parameter=False, warmup_init=False)


def schedule_free(groups: list[dict[str, Any]]) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(groups, warmup_steps=3)
    made.train()
    return made


def prodigy(groups: list[dict[str, Any]]) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(groups, d0=1e-3)


class Coupled(Optimizer):
    """Nobody described it: it divides by the norm of all gradients."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [(one, group) for group in self.param_groups for one in group["params"] if one.grad is not None]
        norm = sum(float(one.grad.square().sum()) for one, _ in every) ** 0.5
        for one, group in every:
            one.sub_(group["lr"] * one.grad / norm)


Make = Callable[[list[dict[str, Any]]], Optimizer]
CASES: dict[str, tuple[Any, Make, dict[str, Any], float]] = {
    "adamw_torch": ("adamw_torch", torch.optim.AdamW, {"weight_decay": 0.01}, 1e-2),
    "sgd": ("sgd", lambda groups: torch.optim.SGD(groups, momentum=0.9), {"momentum": 0.9}, 1e-2),
    "adafactor": ("adafactor", adafactor, {}, 1e-2),
    "schedule_free_adamw": ("schedule_free_adamw", schedule_free, {"warmup_steps": 3}, 1e-2),
    "prodigy": ("prodigy", prodigy, {"d0": 1e-3}, 1.0),
    "undescribed": (Coupled, Coupled, {}, 1e-2),
}


def names_at_first(model: nn.Module) -> list[str]:
    later = {name for names in LATER for name in names}
    return [name for name in detect(model) if name not in later]


def rate_of_new(name: str) -> float:
    """Of groups that come later."""
    return CASES[name][3] * (1.0 if name == "prodigy" else 0.5)


def add_group(name: str, model: nn.Module, optimizer: Any, names: Sequence[str], **more: Any) -> None:
    parameters = {one.fqn: one.parameter for one in detect(model).values()}
    rate = rate_of_new(name)
    members = [parameters[one] for one in names]
    optimizer.add_param_group({"params": members, "lr": rate, "initial_lr": rate, **more})


def train(
    name: str, model: nn.Module, optimizer: Any, template: nn.Module, steps: range = range(GROWING.steps)
) -> list[dict[str, Tensor]]:
    """Steps, with groups added between them, and schedules made before and after; the weights after each."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step, last_epoch=steps[0] - 1)
    history = []
    for step in steps:
        for at, names in zip((FIRST, SECOND), LATER, strict=True):
            if step == at:
                add_group(name, model, optimizer, names)
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step, last_epoch=step - 1)
        listed = {id(one) for group in optimizer.param_groups for one in group["params"]}
        present = {key for key, one in detect(model).items() if id(one.parameter) in listed}
        full = gradients(GROWING, template, step)
        inject(model, {key: one if key in present else None for key, one in full.items()})
        optimizer.step()
        schedule.step()
        history.append(full_parameters(model))
    return history


def build(name: str, model: nn.Module, *others: Sequence[str], **more: Any) -> dist_optim.DistributedOptimizer:
    """On what is there at first, and on other groups."""
    chosen, _, options, rate = CASES[name]
    placed = detect(model)
    params: list[dict[str, Any]]
    params = [{"params": [placed[one].parameter for one in names]} for names in (names_at_first(model), *others)]
    for group in params[1:]:
        group["lr"] = rate_of_new(name)
    return dist_optim.build_optimizer(model, chosen, params=params, lr=rate, print_audit=False, **options, **more)


def reference_of(name: str) -> tuple[list[dict[str, Tensor]], Optimizer]:
    _, make, _, rate = CASES[name]
    template, alone = make_model(GROWING), make_model(GROWING)
    reference = make([{"params": [alone.get_parameter(one) for one in names_at_first(alone)], "lr": rate}])
    return train(name, alone, reference, template), reference


def differing(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> list[str]:
    when = (f"step {at}" for at, _ in enumerate(found))
    gaps = [gap for sides in zip(expected, found, when, strict=True) for gap in gaps_between(*sides)]
    return [str(gap) for gap in gaps if gap.absolute != 0]


def problems_of(name: str, placement: str) -> list[str]:
    expected, reference = reference_of(name)
    model = place(make_model(GROWING), placement)
    optimizer = build(name, model)
    problems = differing(train(name, model, optimizer, make_model(GROWING)), expected)
    for here, there in zip(optimizer.param_groups, reference.param_groups, strict=True):
        if {key: here.get(key) for key in ("lr", "initial_lr")} != {key: there[key] for key in ("lr", "initial_lr")}:
            problems.append(f"{here} is not {there}")
    return problems


@pytest.mark.parametrize("placement", ["ddp", "fsdp1", "fsdp2 units"])
@pytest.mark.parametrize("name", list(CASES))
def test_goes_on_as_upstream_does(name: str, placement: str, two_ranks: RankPool) -> None:
    assert two_ranks.run(problems_of, name, placement) == [[], []]


@pytest.mark.parametrize("name", list(CASES))
def test_in_one_process(name: str) -> None:
    assert problems_of(name, "none") == []


def problems_of_case(case: Case, placement: str) -> list[str]:
    """Every name that takes a group later, as the table of parity asks for it."""
    template, alone = make_model(case), make_model(case)
    first = names_at_first(alone)
    model = place(make_model(case), placement)
    parameters = {one.fqn: one.parameter for one in detect(model).values()}
    reference: Any = case.make_reference(
        [{"params": [alone.get_parameter(one) for one in first], **case.hyperparameters}]
    )
    optimizer: Any = dist_optim.build_optimizer(
        model,
        case.name,
        params=[parameters[one] for one in first],
        **{"print_audit": False, "fused_backward": False, **case.hyperparameters, **case.constructor},
    )
    for one in (reference, optimizer):
        getattr(one, "train", lambda: None)()
    problems: list[str] = []
    for step in range(case.steps):
        if step == FIRST:
            reference.add_param_group(
                {"params": [alone.get_parameter(one) for one in LATER[0]], **case.hyperparameters}
            )
            optimizer.add_param_group({"params": [parameters[one] for one in LATER[0]], **case.hyperparameters})
        present = {*first, *(LATER[0] if step >= FIRST else ())}
        full = {key: one if key in present else None for key, one in gradients(case, template, step).items()}
        inject(model, full)
        for key, one in full.items():
            alone.get_parameter(key).grad = one
        for one in (reference, optimizer):
            set_learning_rates(one, case, step)
            one.step()
        problems += [
            str(gap)
            for gap in gaps_between(weights_of(alone), full_parameters(model), f"step {step}")
            if gap.absolute > case.tolerance
        ]
    return problems


def takes_groups(name: str) -> bool:
    spec = dist_optim.get_spec(name)
    takes = spec.driver.takes_groups_later
    has_own = spec.own_class().add_param_group is not Optimizer.add_param_group
    return not has_own and (takes or (takes is None and type(spec.driver).construct is UpstreamDriver.construct))


@pytest.mark.parametrize("case", [case for case in BY_NAME if takes_groups(case.name)], ids=str)
def test_every_name_that_takes_them(case: Case, two_ranks: RankPool) -> None:
    assert two_ranks.run(problems_of_case, case, "fsdp2 units") == [[], []]


@pytest.mark.parametrize("name", ["adafactor", "adamw_torch"])
def test_under_replicas_of_shards(name: str, four_ranks: RankPool) -> None:
    assert four_ranks.run(problems_of, name, "hsdp") == [[]] * 4


def with_new_groups_left_out(name: str, placement: str) -> int:
    local = dist_optim.DistributedOptimizer.local_gradients

    def of_old(self: dist_optim.DistributedOptimizer, present: Sequence[bool]) -> dict[int, Tensor]:
        first = len(self.holdings.division.groups[0]["params"])
        return {index: one for index, one in local(self, present).items() if index < first}

    with mock.patch.object(dist_optim.DistributedOptimizer, "local_gradients", of_old):
        return len(problems_of(name, placement))


def test_new_groups_that_are_left_out_are_seen(two_ranks: RankPool) -> None:
    assert min(two_ranks.run(with_new_groups_left_out, "adamw_torch", "fsdp2 units")) > 0


def problems_of_masters(placement: str) -> list[str]:
    """Half precision: upstream on fp32 copies, given the gradients in fp32."""
    case = replace(GROWING, dtype=torch.bfloat16)
    template, alone = make_model(case), make_model(case).float()
    reference = torch.optim.AdamW([alone.get_parameter(one) for one in names_at_first(alone)], lr=1e-4)
    model = place(make_model(case), placement)
    parameters = {one.fqn: one.parameter for one in detect(model).values()}
    params = [parameters[one] for one in names_at_first(alone)]
    optimizer = dist_optim.build_optimizer(
        model, "adamw_torch", params=params, lr=1e-4, master_weights=True, print_audit=False
    )
    problems: list[str] = []
    for step in range(case.steps):
        if step == FIRST:
            optimizer.add_param_group({"params": [parameters[one] for one in LATER[0]], "lr": 1e-5})
            reference.add_param_group({"params": [alone.get_parameter(one) for one in LATER[0]], "lr": 1e-5})
        present = {*names_at_first(alone), *(LATER[0] if step >= FIRST else ())}
        full = {key: one if key in present else None for key, one in gradients(case, template, step).items()}
        inject(model, full)
        for key, one in full.items():
            alone.get_parameter(key).grad = None if one is None else one.float()
        optimizer.step()
        reference.step()
        rounded = {key: one.detach().bfloat16() for key, one in alone.named_parameters()}
        problems += [str(gap) for gap in gaps_between(rounded, full_parameters(model), f"step {step}") if gap.absolute]
    return problems


@pytest.mark.parametrize("placement", ["ddp", "fsdp2 units"])
def test_with_masters(placement: str, two_ranks: RankPool) -> None:
    assert two_ranks.run(problems_of_masters, placement) == [[], []]


# Progressive unfreezing, by the engines' own gradients -----------------------------------------------------------


def unfrozen_and_added(title: str, **options: Any) -> None:
    engine = next(engine for engine in ENGINES if engine.title == title)
    sides = TorchSession(engine, None, frozen="first", unused=True, **options), engine.alone(None, frozen="first")
    for one in sides:
        given = [parameter for parameter in one.model.parameters() if parameter.requires_grad]
        more: dict[str, Any] = {"params": given, "lr": 1e-2, "process_group": one.group, "print_audit": False}
        one.optimizers.append(dist_optim.build_optimizer(one.model, "adafactor", **more))
        one.train(range(2))
        one.evaluate()
        one.freeze("first", False)
        first = [placed.parameter for name, placed in detect(one.model).items() if name.startswith("first.")]
        one.optimizers[0].add_param_group({"params": first, "lr": 5e-3})
        one.train(range(2, 5))
    compare("Unfrozen and added", *sides)


@pytest.mark.parametrize("title", ["DDP", "FSDP1", "FSDP2"])
def test_what_is_unfrozen_and_added_is_trained(title: str, two_ranks: RankPool) -> None:
    two_ranks.run(unfrozen_and_added, title)


def test_what_ddp_does_not_reduce_is_refused(two_ranks: RankPool) -> None:
    """It looks at what is trainable once, when it wraps the model."""
    with pytest.raises(RankFailure, match="RanksDisagreeError.*'first.weight'"):
        two_ranks.run(partial(unfrozen_and_added, is_wrapped_frozen=True, differs=True), "DDP")


# Saved and loaded --------------------------------------------------------------------------------------------------


def after_loading(name: str, placement: str, directory: str, is_grown: bool) -> list[str]:
    """Saved after the first new group; loaded into an optimizer that grew too, or was built on both groups."""
    expected, _ = reference_of(name)
    template = make_model(GROWING)
    model = place(make_model(GROWING), placement)
    optimizer = build(name, model)
    train(name, model, optimizer, template, range(FIRST + 1))
    dist_optim.save_checkpoint(directory, model, optimizer)
    second = place(make_model(GROWING), placement)
    again = build(name, second, *([] if is_grown else LATER[:1]))
    if is_grown:
        add_group(name, second, again, LATER[0])
    dist_optim.load_checkpoint(directory, second, again)
    rest = range(FIRST + 1, GROWING.steps)
    return differing(train(name, second, again, template, rest), expected[FIRST + 1 :])


@pytest.mark.parametrize("is_grown", [True, False])
@pytest.mark.parametrize("name", ["schedule_free_adamw", "prodigy"])
def test_saved_and_loaded(name: str, is_grown: bool, two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(after_loading, name, "fsdp2 units", str(tmp_path), is_grown) == [[], []]


def after_its_own_state_dict(name: str) -> list[str]:
    expected, _ = reference_of(name)
    template, model = make_model(GROWING), place(make_model(GROWING), "ddp")
    optimizer = build(name, model)
    train(name, model, optimizer, template, range(FIRST + 1))
    again = build(name, model)
    add_group(name, model, again, LATER[0])
    again.load_state_dict(optimizer.state_dict())
    rest = range(FIRST + 1, GROWING.steps)
    return differing(train(name, model, again, template, rest), expected[FIRST + 1 :])


@pytest.mark.parametrize("name", ["adafactor", "undescribed"])
def test_through_its_state_dict(name: str, two_ranks: RankPool) -> None:
    assert two_ranks.run(after_its_own_state_dict, name) == [[], []]


# Refused -----------------------------------------------------------------------------------------------------------


class Reluctant(Coupled):
    """Takes no group of a single tensor."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups and len(param_group["params"]) == 1:
            raise ValueError("too few")
        super().add_param_group(param_group)


CASES["reluctant"] = (Reluctant, Coupled, {}, 1e-2)


def said_by(name: str, names: Sequence[str], options: dict[str, Any], is_of_first_rank: bool = False) -> str:
    model = place(make_model(GROWING), "ddp")
    optimizer = build(name, model, **options)
    count = len(optimizer.param_groups), len(optimizer.placed_parameters())
    try:
        extra = {"weight_decay": 0.3} if is_of_first_rank and own_rank() == 0 else {}
        add_group(name, model, optimizer, names, **extra)
    except DistOptimError as error:
        assert (len(optimizer.param_groups), len(optimizer.placed_parameters())) == count
        for step in range(2) if optimizer.inside_backward is None else ():
            full = gradients(GROWING, make_model(GROWING), step)
            later = {one for names in LATER for one in names}
            inject(model, {key: None if key in later else one for key, one in full.items()})
            optimizer.step()  # as if nobody had asked
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("name", "names", "options", "message"),
    [
        ("adamw_torch", ["linears.0.weight"], {}, "ParameterError.*is in a group already.*params="),
        ("adamw_torch", LATER[0], {"fused_backward": True}, "UnsupportedError.*inside backward.*Pass all groups"),
        ("reluctant", LATER[1], {}, "RankFailedError.*ValueError: too few"),
        ("independent", LATER[0], {"independent": True}, "UnsupportedError.*independent=False.*Pass all groups"),
    ],
)
def test_refused_on_all_ranks_and_nothing_is_changed(
    name: str, names: Sequence[str], options: dict[str, Any], message: str, two_ranks: RankPool
) -> None:
    for said in two_ranks.run(said_by, name, names, options):
        assert re.search(message, said), said


CASES["independent"] = (Coupled, Coupled, {}, 1e-2)


def test_another_group_on_one_rank_is_refused(two_ranks: RankPool) -> None:
    for said in two_ranks.run(said_by, "adamw_torch", LATER[0], {}, True):
        assert "RanksDisagreeError" in said and "weight_decay" in said


@pytest.mark.parametrize("name", ["grokadamw", "muon", "adamw_bnb_8bit", "galore_adamw"])
def test_what_arranges_its_groups_when_built_says_so(name: str) -> None:
    model = make_model(GROWING)
    more: dict[str, Any] = {"target_modules": ["linears"], "rank": 2} if name == "galore_adamw" else {}
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **more)
    with pytest.raises(UnsupportedError, match="List what is frozen until later in them too"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def said_by_engine() -> list[str]:
    import zero

    said = []
    optimizer = zero.engine_of(zero.ZeroRun("sgd", {"lr": 0.1}, 2)).basic_optimizer
    for one in (optimizer, *optimizer.parts()):
        try:
            one.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        except UnsupportedError as error:
            said.append(str(error))
    return said


def test_deepspeed_divides_once(two_ranks: RankPool) -> None:
    pytest.importorskip("deepspeed")
    for said in two_ranks.run(said_by_engine):
        assert len(said) == 2 and all("divide" in one and "Pass all groups" in one for one in said)


def test_a_parameter_of_another_model_is_refused() -> None:
    model = make_model(GROWING)
    optimizer = build("adamw_torch", model)
    with pytest.raises(ParameterError, match="not a parameter of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
