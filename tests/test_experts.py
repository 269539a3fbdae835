"""A stack of experts is as many matrices: equal to upstream on separate parameters, under every sharding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from apollo_torch import APOLLOAdamW
from galore_torch import GaLoreAdamW
from placements import full_parameters, inject, place
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import HyperparameterError, ParameterError
from dist_optim.exchange.plan import Item, make_plan
from dist_optim.integrations.deepspeed.engine import build_optimizer_for_engine
from dist_optim.layouts import BoxShard, DimShard, FlatRange, Layout, Replicated
from dist_optim.layouts.holders import Holders
from dist_optim.layouts.stack import Member, layer_of
from dist_optim.testing import RankPool, assert_equal, assert_no_problems_on_any_rank

LOW_RANK = {"rank": 3, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std"}
STEPS = 5
STACKS = ("experts.up", "experts.down")


class SparseExperts(nn.Module):
    """As transformers 5 keeps them: no linear layers, and as many matrices of one shape as there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 7, 6))
        self.down = nn.Parameter(torch.randn(5, 6, 7))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.router = nn.Linear(6, 5)
        self.experts = SparseExperts()
        self.conv = nn.Conv1d(3, 4, 2)
        self.lm_head = nn.Linear(6, 11, bias=False)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Sparse().named_parameters()}


def reference(name: str) -> dict[str, Tensor]:
    """The unmodified upstream optimizer, given each expert as a parameter of its own."""
    model = Sparse()
    whole = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    leaves = {
        key: [nn.Parameter(part.clone()) for part in full] if key in STACKS else [nn.Parameter(full.clone())]
        for key, full in whole.items()
    }
    taken = ["router.weight", *STACKS] + ([] if name == "muon" else ["lm_head.weight"])
    order = [key for key in whole if key in taken]
    low = [one for key in order for one in leaves[key]]
    rest = [one for key in whole if key not in taken for one in leaves[key]]
    optimizers: list[torch.optim.Optimizer]
    if name == "muon":
        optimizers = [
            torch.optim.Muon(low, lr=1e-2, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.0),
        ]
    else:
        kind: Any = GaLoreAdamW if name == "galore_adamw" else APOLLOAdamW
        more = {} if name == "galore_adamw" else {"proj": "random", "scale_type": "channel"}
        optimizers = [kind([{"params": rest}, {"params": low, **LOW_RANK, **more}], lr=1e-2, eps=1e-7)]
    for step in range(STEPS):
        for key, full in gradients(step).items():
            for at, leaf in enumerate(leaves[key]):
                leaf.grad = full[at].clone() if key in STACKS else full.clone()
        for optimizer in optimizers:
            optimizer.step()
    return {key: torch.stack(list(own)) if key in STACKS else own[0].detach() for key, own in leaves.items()}


def build(name: str, model: nn.Module, **more: Any) -> dist_optim.DistributedOptimizer:
    options: dict[str, Any] = {"weight_decay": 0.1, "rest_options": {"weight_decay": 0.0}}
    if name != "muon":
        options = {"target_modules": "all-linear", "eps": 1e-7, **LOW_RANK}
    return dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **{**options, **more})


def equals_separate_parameters(name: str, placements: list[str], folder: Path) -> None:
    expected, problems = reference(name), []
    for placement in placements:
        model = place(Sparse(), placement)
        optimizer = build(name, model, check_ranks_every=2)
        owners = {optimizer.holdings.plan.owners[at] for at, one in enumerate(optimizer.holdings.placed) if one.member}
        assert len(owners) == min(5, dist.get_world_size()), "each expert has an owner of its own"
        for step in range(STEPS):
            if step == 3:
                dist_optim.save_checkpoint(folder / placement, model, optimizer)
                model = place(Sparse(), placement)
                optimizer = build(name, model)
                dist_optim.load_checkpoint(folder / placement, model, optimizer)
            inject(model, dict(gradients(step)))
            optimizer.step()
        actual = full_parameters(model)
        problems += [f"{placement}: {key}" for key in expected if not torch.equal(actual[key], expected[key])]
        stepped = next(iter(optimizer.state.values()))
        assert stepped or not len(optimizer.state)
    assert_no_problems_on_any_rank(problems)


PLACES: dict[str, dict[int, list[str]]] = {
    "galore_adamw": {1: ["none"], 2: ["fsdp2"], 4: ["ep"]},
    "apollo_adamw": {2: ["fsdp1"], 4: ["ep"]},
    "muon": {2: ["ddp", "fsdp2"]},
}
"""By the number of ranks."""


@pytest.mark.parametrize("name", PLACES)
def test_a_stack_of_experts_equals_upstream_on_separate_parameters(
    name: str, one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    for num_ranks, placements in PLACES[name].items():
        pool = {1: one_rank, 2: two_ranks, 4: four_ranks}[num_ranks]
        pool.run(equals_separate_parameters, name, placements, tmp_path / str(num_ranks))


@pytest.mark.parametrize(
    "layout",
    [
        Replicated(),
        DimShard(0, 3),
        DimShard(2, 2),
        FlatRange((0, 5, 5, 31, 60)),
        FlatRange((0, 31, 60), Holders((0, 1, 0, 1))),
        BoxShard(((0, 2), (1, 2), (0, 2)), tuple((a, b, c) for a in range(2) for b in range(2) for c in range(2))),
        BoxShard(((1, 2),), ((0,), (1,), (0,), (1,))),
    ],
    ids=str,
)
def test_the_parts_of_a_matrix_are_those_of_its_stack(layout: Layout) -> None:
    stack = torch.arange(60).view(5, 4, 3)
    num_ranks = {Replicated: 2, DimShard: 3, FlatRange: 4, BoxShard: 8}[type(layout)]
    num_ranks = min(num_ranks, getattr(layout, "world_size", 8), len(getattr(layout, "chunks", range(8))))
    for at in range(5):
        own = layer_of(layout, stack.shape, at)
        for rank in range(num_ranks):
            held = layout.view_of(stack, rank).clone()
            part = Member(layout, stack.shape, at).part_of(held, rank)
            assert_equal(part, own.view_of(stack[at], rank))
            assert part.numel() == own.numel_on(stack.shape[1:], rank)
        most = max(own.numel_on(stack.shape[1:], rank) for rank in range(num_ranks))
        assert own.numel_on(stack.shape[1:], own.home(stack.shape[1:])) == most or isinstance(own, FlatRange)


def test_replicas_share_the_experts_that_lie_whole_with_one_rank_of_each() -> None:
    """HSDP of two shards, twice: an expert has a home in either replica, and each takes as many."""
    stack, shape = BoxShard(((0, 2),), ((0,), (1,), (0,), (1,))), torch.Size([7, 6])
    items = [
        Item(at, shape, layer_of(stack, torch.Size([8, *shape]), at), torch.float32, torch.device("cpu"), 1.0)
        for at in range(8)
    ]
    owners = make_plan(items, 4, 1 << 20).owners
    assert [owners[at] for at in range(8)] == [0, 2, 0, 2, 1, 3, 1, 3]


def test_the_audit_tells_how_much_the_algorithm_takes() -> None:
    audit = build("galore_adamw", Sparse()).route_audit()
    assert re.search(r"galore_adamw as matrices: 8\d\.\d% of the trained elements$", audit)
    few = build("galore_adamw", Sparse(), target_modules=["router"]).route_audit()
    assert re.search(r"careful: galore_adamw as matrices: \d\.\d% of the trained", few)
    assert "as matrices" not in dist_optim.build_optimizer(Sparse(), "sgd", lr=0.1, print_audit=False).route_audit()


@pytest.mark.parametrize(
    ("name", "least", "error", "message"),
    [
        ("galore_adamw", 0.99, ParameterError, r"takes 8\d\.\d% of the trained .* asks for 99.0%.*target_modules"),
        ("muon", 0.99, ParameterError, r"muon takes .* min_coverage asks for 99.0%"),
        ("galore_adamw", 2, HyperparameterError, "min_coverage=2 is no share"),
    ],
)
def test_too_little_for_the_algorithm_is_refused(name: str, least: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(name, Sparse(), min_coverage=least)


def test_where_stacks_stay_whole_the_audit_says_so() -> None:
    left = r"careful: galore_adamw\w* as matrices: \d+\.\d% .*; inside backward .* are none \(2 tensors\)"
    options: dict[str, Any] = {"lr": 1e-2, "target_modules": "all-linear", "rank": 3, "print_audit": False}
    engines = build_optimizer_for_engine(Sparse(), "galore_adamw", **options)
    assert re.fullmatch(r"galore_adamw as matrices: 8\d\.\d% of the trained elements", engines.coverage or "")
    inside = dist_optim.build_optimizer(Sparse(), "galore_adamw_layerwise", **options)
    assert re.search(left, inside.route_audit())
    with pytest.raises(ParameterError, match=r"galore_adamw takes \d+\.\d% .* asks for 99\.0%"):
        build_optimizer_for_engine(Sparse(), "galore_adamw", min_coverage=0.99, **options)


def test_control_a_stack_without_its_mark_is_no_stack_of_matrices() -> None:
    model = Sparse()
    model.add_module("others", nn.ParameterList([nn.Parameter(torch.randn(5, 4, 3))]))
    optimizer = build("galore_adamw", model)
    members = {one.fqn for one in optimizer.placed_parameters() if one.member}
    assert members == {f"{name}.{at}" for name in STACKS for at in range(5)}
