"""Gradients that do not lie as their parameters do: cut, or refused on all ranks with the reason and a way on."""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import full_parameters, own_group, place
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dist_optim
from dist_optim.errors import DistOptimError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.testing import RankFailure, RankPool, assert_equal

PLACEMENTS = {"0.weight": Shard(0), "0.bias": Shard(0), "1.weight": Shard(1), "1.bias": Replicate()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))  # 7 is cut unevenly


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def tensor_parallel() -> nn.Module:
    """As tensor parallelism leaves the parameters."""
    model = net()
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        placed = distribute_tensor(parameter.detach(), mesh(), [PLACEMENTS[name]], src_data_rank=None)
        setattr(model.get_submodule(module), attribute, nn.Parameter(placed))
    return model


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in net().named_parameters()}


def set_gradients(model: nn.Module, step: int, kind: str) -> None:
    """Whole on every rank, or a term of the sum on each."""
    for name, parameter in model.named_parameters():
        whole = gradients(step)[name]
        if not isinstance(parameter, DTensor):
            parameter.grad = whole
        elif kind == "repeated":
            parameter.grad = DTensor.from_local(whole, mesh(), [Replicate()])
        else:
            term = whole * (0.25, 0.75)[dist.get_rank()]  # both exact, and so is their sum
            parameter.grad = DTensor.from_local(term, mesh(), [Partial()])


def train(model: nn.Module, name: str, kind: str, group: Any = None) -> dict[str, Tensor]:
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, process_group=group)
    for step in range(3):
        set_gradients(model, step, kind)
        if kind == "partial":
            for parameter in model.parameters():  # as the refusal says
                assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
                parameter.grad = parameter.grad.redistribute(parameter.device_mesh, parameter.placements)
        norm = optimizer.clip_grad_norm_(0.5)
        assert norm > 0.5, "clipping must bind"
        optimizer.step()
    return full_parameters(model)


def equals_one_process(name: str, kind: str) -> None:
    assert_equal(train(tensor_parallel(), name, kind), train(net(), name, "plain", own_group()))


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor"])
def test_gradients_that_every_rank_has_whole_are_cut_as_the_parameters_are(name: str, two_ranks: RankPool) -> None:
    two_ranks.run(equals_one_process, name, "repeated")


def uncut() -> None:
    with mock.patch.object(PlacedParameter, "_is_repeated", lambda self, gradient: False):
        equals_one_process("adamw_torch", "repeated")


def test_control_uncut_gradients_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"is placed \(Replicate\(\),\), and the parameter \(Shard\(dim=0\),\)"):
        two_ranks.run(uncut)


def test_the_way_that_is_named_for_unreduced_gradients_is_right(two_ranks: RankPool) -> None:
    two_ranks.run(equals_one_process, "adafactor", "partial")


def refused(placement: str, fault: str) -> str:
    """The fault is on the last rank alone; all raise, and nothing is changed."""
    if placement == "tensor parallel":
        model = tensor_parallel()
        set_gradients(model, 0, "repeated")
        if dist.get_rank() == 1:
            set_gradients(model, 0, "partial")
    else:
        model = net()
        for parameter in model.parameters() if fault == "grad_dtype" else ():
            parameter.grad_dtype = None
        model = place(model, placement)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if dist.get_rank() == 1:
            first = next(model.parameters())
            assert first.grad is not None
            if fault == "grad_dtype":
                first.grad_dtype = None
                first.grad = first.grad.to(torch.bfloat16)
            else:
                first.grad = first.grad.to_sparse()
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    before = full_parameters(model)
    with pytest.raises(UnsupportedError) as caught:
        optimizer.step()
    assert_equal(full_parameters(model), before)
    return str(caught.value)


@pytest.mark.parametrize(
    ("placement", "fault", "message"),
    [
        ("tensor parallel", "partial", r"'0.weight' is placed \(Partial.*one term of the sum.*\.redistribute\("),
        ("ddp", "grad_dtype", "'0.weight' is torch.bfloat16, and the parameter torch.float32.*grad_dtype"),
        ("fsdp2", "grad_dtype", "'0.weight' is torch.bfloat16, and the parameter torch.float32.*grad_dtype"),
        ("ddp", "sparse", "'0.weight' is sparse.*sparse=False in the embedding"),
    ],
)
def test_other_gradients_are_refused_on_all_ranks(
    placement: str, fault: str, message: str, two_ranks: RankPool
) -> None:
    for text in two_ranks.run(refused, placement, fault):
        assert re.search(message, text) and text.endswith("No parameter was changed.")


class Tied(nn.Module):
    """A table that is the head too: the sum of a sparse and a dense gradient is dense."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4, sparse=True)
        self.head = nn.Linear(4, 7, bias=False)
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.words(words)), words)


def test_a_sparse_table_that_is_tied_to_the_head_is_stepped() -> None:
    trained = []
    for is_ours in (True, False):
        model = Tied(is_tied=True)
        given: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0}
        ours, stock = dist_optim.build_optimizer(model, "adamw_torch", **given), torch.optim.AdamW
        optimizer = ours if is_ours else stock(model.parameters(), **given)
        for step in range(2):
            model(torch.arange(step, 7)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(dict(model.named_parameters()))
    assert_equal(trained[1], trained[0])


def test_a_sparse_table_is_refused_unless_it_is_frozen() -> None:
    model = Tied(is_tied=False)
    with pytest.raises(UnsupportedError, match="'words.weight' would be sparse.*sparse=False"):
        dist_optim.build_optimizer(model, "sgd", lr=0.1)
    model.words.weight.requires_grad_(False)
    dist_optim.build_optimizer(model, "sgd", lr=0.1)


def unreduced_beside_shards() -> str:
    """FSDP2 does not reduce what it was told to ignore."""
    model = net()
    ignored = model[1].bias  # type: ignore[index]
    model = place(model, "fsdp2", ignored_params={ignored})
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    model(torch.full((2, 6), float(dist.get_rank()))).square().mean().backward()
    with pytest.raises(DistOptimError) as caught:
        optimizer.step()
    dist.all_reduce(ignored.grad, op=dist.ReduceOp.SUM)  # as the refusal says
    ignored.grad /= dist.get_world_size()
    optimizer.step()
    return str(caught.value)


def test_what_fsdp2_ignores_is_named_with_its_own_remedy(two_ranks: RankPool) -> None:
    for text in two_ranks.run(unreduced_beside_shards):
        assert "the gradient of '1.bias'" in text and "ignored_params" in text and "DistributedData" not in text
