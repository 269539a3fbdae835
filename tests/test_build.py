"""Building: groups as asked for, mistakes refused on all ranks together, and what step() refuses afterwards."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parity import Net
from placements import place
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim import errors
from dist_optim.testing import RankFailure, RankPool

GALORE: dict[str, Any] = {"lr": 1e-2, "rank": 4, "target_modules": "all-linear"}


def make_net() -> Net:
    return Net(((6, 4), (4, 6)), ((5, 3), (3,)))


def build(name: Any = "galore_adamw", model: nn.Module | None = None, **options: Any) -> Any:
    return dist_optim.build_optimizer(model or make_net(), name, **{"print_audit": False, **options})


def test_low_rank_groups_come_last_and_decay_groups_are_kept() -> None:
    optimizer = build(weight_decay=0.1, no_decay=["linears.0.bias", "extra.1"], **GALORE)
    described = [(group.get("rank"), group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert described == [(None, 0.1, 1), (None, 0.0, 2), (4, 0.1, 2)]


def test_groups_of_the_user_are_kept_with_their_values() -> None:
    model = make_net()
    groups = [{"params": model.linears.parameters(), "lr": 0.5}, {"params": [model.extra[0]], "weight_decay": 0.3}]
    optimizer = build("adamw_torch", model, lr=0.1, weight_decay=0.2, params=groups)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.2), (0.1, 0.3)]
    assert optimizer.param_groups[0]["params"][0] is model.linears[0].weight


def test_groups_that_name_rank_are_low_rank_as_they_stand() -> None:
    model = make_net()
    matrices = [layer.weight for layer in model.linears]
    optimizer = build(model=model, lr=0.1, params=[{"params": matrices, "rank": 2}, {"params": list(model.extra)}])
    assert [group.get("rank") for group in optimizer.param_groups] == [2, None]
    assert optimizer.param_groups[0]["update_proj_gap"] == 200


def test_class_in_place_of_a_name_keeps_its_own_defaults() -> None:
    optimizer = build(torch.optim.AdamW, lr=0.1)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-2
    assert optimizer.spec.name == "adamw_torch"


def assert_raised_on_both(pool: RankPool, message: str, body: Callable[..., Any], *arguments: Any) -> None:
    """Both ranks raise the message, on their own: none is left waiting for the other."""
    with pytest.raises(RankFailure) as failure:
        pool.run(body, *arguments)
    assert sorted(failure.value.tracebacks) == [0, 1]
    for text in failure.value.tracebacks.values():
        assert re.search(message, text, flags=re.DOTALL), text


MISTAKES = [
    ({"name": "galor_adamw"}, "UnknownOptimizerError", "galore_adamw"),
    ({"name": 3}, "ParameterError", "registered name"),
    ({"target_modules": None}, "TargetModulesError", "needs target_modules.*linears.N"),
    ({"target_modules": ["attn"]}, "TargetModulesError", "selects no linear layer.*linears.N"),
    ({"target_modules": ["(oops"]}, "TargetModulesError", "regular expression"),
    (
        {"name": "sgd", "rank": None, "target_modules": "all-linear"},
        "(TargetModules|Hyperparameter)Error",
        "sgd has no",
    ),
    ({"rnak": 3}, "HyperparameterError", "Did you mean 'rank'"),
    ({"params": []}, "ParameterError", "nothing to optimize"),
    ({"params": [nn.Parameter(torch.zeros(2))]}, "ParameterError", "not a parameter of the model"),
]


def build_with_mistake_on(ranks: list[int], options: dict[str, Any]) -> None:
    if dist.get_rank() in ranks:
        build(**{**GALORE, **options})
    else:
        build(**GALORE)


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_refused_on_all_ranks(
    options: dict[str, Any], error: str, message: str, two_ranks: RankPool
) -> None:
    assert_raised_on_both(two_ranks, f"{error}: .*{message}", build_with_mistake_on, [0, 1], options)


def test_mistake_on_one_rank_is_raised_on_all(two_ranks: RankPool) -> None:
    message = r"UnknownOptimizerError: (\[from rank 0\] )?There is no.*nearest names"
    assert_raised_on_both(two_ranks, message, build_with_mistake_on, [0], {"name": "galor_adamw"})


def build_with_other_rank_argument() -> None:
    build(**{**GALORE, "rank": 4 + dist.get_rank()})


def test_other_hyperparameters_on_one_rank_are_named(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match=": rank is 4 on rank 0 and 5 on rank 1"):
        two_ranks.run(build_with_other_rank_argument)


def test_reverse_std_that_upstream_cannot_do_is_refused() -> None:
    with pytest.raises(errors.UnsupportedError, match="'linears.1.weight'.*rank < 4"):
        build(**GALORE, proj_type="reverse_std")


def test_arguments_that_exclude_each_other_are_refused_with_upstreams_reason() -> None:
    with pytest.raises(errors.HyperparameterError, match="Nesterov momentum requires"):
        build("sgd", lr=0.1, nesterov=True)


def test_group_added_later_is_refused_inside_backward() -> None:
    with pytest.raises(errors.UnsupportedError, match="inside backward.*params="):
        build("sgd", lr=0.1, fused_backward=True).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_gradient_of_a_parameter_frozen_at_building_is_refused() -> None:
    model = make_net()
    model.extra[0].requires_grad_(False)
    optimizer = build("sgd", model, lr=0.1)
    model.extra[0].requires_grad_(True)
    model.extra[0].grad = torch.ones(5, 3)
    with pytest.raises(errors.ParameterError, match="'extra.0'.*frozen"):
        optimizer.step()


def step_with_gradient(kind: str) -> None:
    model = make_net()
    optimizer = build("sgd", DistributedDataParallel(model), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if kind == "local":
        model.extra[0].grad = torch.full((5, 3), float(dist.get_rank()))
    elif dist.get_rank() == 1:
        model.extra[0].grad = None
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("local", "gradient of 'extra.0'.*DistributedDataParallel"),
        ("missing", "'extra.0' has a gradient on some ranks"),
    ],
)
def test_gradients_that_were_not_reduced_are_refused_on_all_ranks(kind: str, message: str, two_ranks: RankPool) -> None:
    assert_raised_on_both(two_ranks, message, step_with_gradient, kind)


def audit(name: str, **options: Any) -> str:
    return build(name, DistributedDataParallel(make_net()), **options).route_audit()


def audit_of_one_matrix() -> str:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    return build("adamw_torch", DistributedDataParallel(net), lr=0.1).route_audit()


def test_route_audit_says_which_owner_all_others_wait_for(two_ranks: RankPool) -> None:
    (text, _) = two_ranks.run(audit_of_one_matrix)
    assert "careful: rank 0 steps 1.6 times the mean (its largest is '0.weight', 80.0%)" in text


def test_route_audit_names_tensors_bytes_shapes_and_owners(two_ranks: RankPool) -> None:
    text = two_ranks.run(audit, "galore_adamw", **GALORE)[0]
    assert "galore_adamw on 2 ranks" in text
    assert "group 0 (full rank" in text and "3 tensors, 24 elements, 96 B (1 of 6, 1 of 5x3, 1 of 3)" in text
    assert "group 1 (low rank 4" in text and "2 tensors, 48 elements, 192 B (1 of 6x4, 1 of 4x6)" in text
    assert "rank 0" in text and "rank 1" in text


def state_bytes() -> tuple[int, int]:
    model = Net(((64, 32),) * 24, ())
    optimizer = build("adamw_torch", DistributedDataParallel(model), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.optimizer_state_bytes(), sum(8 * p.numel() + 4 for p in model.parameters())


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_is_divided_over_the_ranks(world_size: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 3: "three_ranks"}[world_size])
    held = pool.run(state_bytes)
    assert sum(own for own, _ in held) == held[0][1]
    assert max(own for own, _ in held) <= 1.1 * held[0][1] / world_size


def load_the_other_ranks_share() -> None:
    optimizer = build("adamw_torch", lr=0.1)
    shares: list[Any] = [None, None]
    dist.all_gather_object(shares, optimizer.state_share())
    optimizer.load_state_dict(shares[0])


def test_share_of_another_rank_is_refused(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="StateDictError: .*saved with rank 0, but is loaded with rank 1"):
        two_ranks.run(load_the_other_ranks_share)


def test_state_dict_of_other_groups_is_refused() -> None:
    with pytest.raises(errors.StateDictError, match="target_modules"):
        build(**GALORE).load_state_dict(build(**{**GALORE, "target_modules": ["linears.0"]}).state_dict())


def test_an_optimizer_that_is_built_already_is_refused() -> None:
    model = make_net()
    with pytest.raises(errors.ParameterError, match="instance of SGD.*'sgd', lr="):
        build(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(errors.ParameterError, match="instance of DistributedOptimizer.*'adamw_torch', lr="):
        build(build("adamw_torch", model, lr=0.1), model)


Edit = Callable[[list[Any], nn.Parameter], object]
EDITS: dict[str, tuple[Edit, str]] = {
    "exchanged": (lambda groups, new: operator.setitem(groups[0]["params"], 0, new), "is missing, 1 are new"),
    "grown": (lambda groups, new: groups[0]["params"].append(new), "1 are new"),
    "shrunk": (lambda groups, new: groups[0]["params"].pop(), "is missing"),
    "reordered": (lambda groups, new: groups[0]["params"].reverse(), "listed otherwise"),
    "a group more": (lambda groups, new: groups.append({"params": [new], "lr": 0.1}), "has 2 groups.*built with 1"),
    "a group less": (lambda groups, new: groups.clear(), "has 0 groups.*built with 1"),
    "no params": (lambda groups, new: groups[0].pop("params"), "is missing, . more are"),
}


def change_after_building(kind: str) -> None:
    """One rank is enough for all to raise; the others would wait for it in the exchange."""
    torch.manual_seed(0)
    net = make_net()
    model: nn.Module = net
    optimizer = build("sgd", net, lr=0.1)
    if kind == "replaced" and dist.get_rank() == 1:
        net.extra[0] = nn.Parameter(torch.zeros(5, 3))
    elif kind == "converted":
        model.double()
    elif kind in EDITS and dist.get_rank() == 1:
        EDITS[kind][0](optimizer.param_groups, nn.Parameter(torch.zeros(6, 4)))
    elif kind in ("fsdp1", "fsdp2"):
        model = place(model, kind)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("replaced", "'extra.0' of the optimizer is no longer the model's.*Build the optimizer last"),
        ("converted", "'linears.0.weight' was torch.float32 of shape .6, 4. on cpu .* is torch.float64"),
        ("exchanged", "param_groups.0. were edited after building: 'linears.0.weight' is missing, 1 are new.*Put"),
        ("fsdp1", "'linears.0.weight' was .* of shape .6, 4.*integrations.accelerate.prepare"),
        ("fsdp2", "'linears.0.weight' of the optimizer is no longer the model's"),
    ],
)
def test_parameters_that_are_no_longer_the_models_are_refused_on_all_ranks(
    kind: str, message: str, two_ranks: RankPool
) -> None:
    assert_raised_on_both(two_ranks, f"ParameterError: .*{message}", change_after_building, kind)


@pytest.mark.parametrize("kind", EDITS)
def test_groups_that_were_edited_are_refused(kind: str, tmp_path: Path) -> None:
    """By the next step and by the next save; put back, all goes on."""
    model, (edit, message) = make_net(), EDITS[kind]
    optimizer = build("sgd", model, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    edit(optimizer.param_groups, nn.Parameter(torch.zeros(6, 4)))
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(errors.ParameterError, match=message):
            call()
    with pytest.raises(errors.ParameterError, match=message):
        dist_optim.save_checkpoint(tmp_path / "run", model, optimizer)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    optimizer.param_groups = groups
    optimizer.step()
    dist_optim.save_checkpoint(tmp_path / "run", model, optimizer)


def test_edits_on_one_rank_are_refused_on_all(two_ranks: RankPool) -> None:
    assert_raised_on_both(two_ranks, "ParameterError: .*has 2 groups", change_after_building, "a group more")


def test_parameters_replaced_in_the_middle_of_a_run_are_refused() -> None:
    model = make_net()
    optimizer = build("sgd", model, lr=0.1)
    optimizer.step()
    model.extra[0] = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(errors.ParameterError, match="'extra.0'.*no longer the model's"):
        optimizer.step()


def build_where_only_cuda_communicates() -> None:
    with mock.patch.object(dist, "get_backend_config", lambda group: "cuda:nccl"):
        build("sgd", lr=0.1)


def test_parameters_on_a_device_that_cannot_communicate_are_refused(two_ranks: RankPool) -> None:
    assert_raised_on_both(two_ranks, "is on cpu, where.*'cpu:gloo,cuda:nccl'", build_where_only_cuda_communicates)
