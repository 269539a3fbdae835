"""Param groups by pattern: what each matches, what is refused, and rates relative to the optimizer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from placements import place
from torch import nn

import dist_optim
from dist_optim.errors import HyperparameterError, ParameterError
from dist_optim.testing import RankPool


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3))
        self.head = nn.Linear(6, 11, bias=False)


REST: dict[str, Any] = {"params": "*"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("*.0.0.*", ["layers.0.0.weight", "layers.0.0.bias"]),
        ("layers.?.1.bias", [f"layers.{at}.1.bias" for at in range(3)]),
        ("re:layers\\.[01]\\.0\\.bias", ["layers.0.0.bias", "layers.1.0.bias"]),
        (["embed.*", "head.*"], ["embed.weight", "head.weight"]),
        (lambda name, parameter: parameter.shape == (6, 6), [f"layers.{at}.0.weight" for at in range(3)]),
    ],
    ids=["a name", "glob", "one letter", "regular", "several", "function"],
)
def test_what_a_pattern_matches(pattern: Any, expected: list[str]) -> None:
    assert names_of_first([{"params": pattern}, REST]) == expected


def names_of_first(params: list[Any]) -> list[str]:
    optimizer = dist_optim.build_optimizer(Net(), "adamw_torch", params=params, lr=1e-2, print_audit=False)
    return optimizer.holdings.names_by_group()[0]


def test_the_first_match_takes_a_parameter_and_groups_keep_their_values() -> None:
    groups = [{"params": "*.bias", "weight_decay": 0.0}, {"params": "layers.*", "lr_scale": 0.5}, REST]
    optimizer = dist_optim.build_optimizer(
        Net(), "adamw_torch", params=groups, lr=1e-2, weight_decay=0.1, print_audit=False
    )
    names = optimizer.holdings.names_by_group()
    assert all(name.endswith("bias") for name in names[0]) and len(names[0]) == 6
    assert names[2] == ["embed.weight", "head.weight"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-2, 0.0),
        (0.5e-2, 0.1),
        (1e-2, 0.1),
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([{"params": "layer.*"}, REST], "'layer.*' of group 0 matches no parameter. Some names are: 'layers"),
        ([{"params": "re:("}, REST], "no regular expression"),
        ([{"params": "layers.*"}, {"params": "layers.0.*"}, REST], "'layers.0.*' of group 1 matches .* in group 0"),
        ([{"params": "layers.*"}], "2 parameters that are trained are in no group: 'embed.weight', 'head.weight'"),
        ([{"params": lambda name, _: name}, REST], "returned 'embed.weight'"),
    ],
    ids=["nothing", "no expression", "all taken", "left out", "no answer"],
)
def test_what_patterns_are_refused(params: list[Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        dist_optim.build_optimizer(Net(), "adamw_torch", params=params, lr=1e-2, print_audit=False)


def test_frozen_parameters_may_be_left_out_and_listed_ones_are_stepped_once_unfrozen() -> None:
    model = Net()
    model.embed.requires_grad_(False)
    left_out = [{"params": ["layers.*", "head.*"]}]
    optimizer = dist_optim.build_optimizer(model, "sgd", params=left_out, lr=1e-2, print_audit=False)
    assert "embed.weight" not in optimizer.holdings.names_by_group()[0]
    optimizer = dist_optim.build_optimizer(model, "sgd", params=[REST], lr=1.0, print_audit=False)
    model.embed.requires_grad_(True)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    before = model.embed.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.embed.weight, before - 1)


@pytest.mark.parametrize("group", [{"lr_scale": "half"}, {"lr_scale": -1.0}, {"lr_scale": 0.5, "lr": 1.0}])
def test_a_scale_that_says_nothing_is_refused(group: dict[str, Any]) -> None:
    with pytest.raises(HyperparameterError, match="lr_scale"):
        dist_optim.build_optimizer(Net(), "adamw_torch", params=[{"params": "*", **group}], lr=1e-2, print_audit=False)


def test_parameters_themselves_go_before_patterns() -> None:
    model = Net()
    groups: list[Any] = [{"params": [model.head.weight]}, REST]
    optimizer = dist_optim.build_optimizer(model, "sgd", params=groups, lr=1e-2, print_audit=False)
    assert optimizer.holdings.names_by_group()[0] == ["head.weight"]
    with pytest.raises(ParameterError, match="group 1 lists 'head.weight', which a pattern of group 0 has taken"):
        dist_optim.build_optimizer(model, "sgd", params=groups[::-1], lr=1e-2, print_audit=False)


def groups_under(placement: str) -> list[list[str]]:
    """The function sees whole shapes, although FSDP1 shows flat parts and FSDP2 shards."""
    model = place(Net(), placement)
    groups: list[Any] = [{"params": lambda _, parameter: parameter.ndim == 2}, {"params": "*.bias"}, REST]
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", params=groups, lr=1e-2, print_audit=False)
    return optimizer.holdings.names_by_group()


def test_patterns_mean_the_same_under_every_engine(two_ranks: RankPool) -> None:
    plain = groups_under("none")
    assert len(plain) == 3 and len(plain[0]) == 5
    for placement in ("ddp", "fsdp2", "fsdp1"):
        assert two_ranks.run(groups_under, placement) == [plain, plain]


def test_layerwise_decay_scales_by_depth() -> None:
    groups = dist_optim.layerwise_decay(Net(), 0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["params"]}
    assert scales["embed.weight"] == 0.5**4 and scales["head.weight"] == 1.0
    assert [scales[f"layers.{at}.0.weight"] for at in range(3)] == [0.5**3, 0.5**2, 0.5]
    optimizer = dist_optim.build_optimizer(Net(), "adamw_torch", params=groups, lr=1e-2, print_audit=False)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-2 * 0.5**at for at in (4, 3, 2, 1, 0)]
