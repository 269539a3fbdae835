"""``reduce_to_owner``: gradients go to their owners inside FSDP2's backward, and every loop is right or is told."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import full_parameters, own_group, place, units_of
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import dist_optim
from dist_optim.errors import UnsupportedError
from dist_optim.inside_backward import to_owners
from dist_optim.stepping.at_owner import AtOwner
from dist_optim.testing import RankPool

OPTIONS: dict[str, Any] = {"lr": 1e-2, "print_audit": False}
NAME = "adafactor"


class Net(nn.Module):
    """Its gradients are what it is given, exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(24, 40), nn.Linear(40, 17), nn.Linear(3, 3)
        self.second.bias.requires_grad_(False)

    def forward(self, gradients: dict[str, Tensor], without: str = "unused") -> Tensor:
        used = [(name, one) for name, one in self.named_parameters() if one.requires_grad and without not in name]
        return torch.stack([(one * gradients[name]).sum() for name, one in used]).sum()


def gradients(step: int) -> dict[str, Tensor]:
    """With few digits, so that sums and means of three are exact."""
    torch.manual_seed(1 + step)
    return {name: torch.randn(one.shape).bfloat16().float() * 2**step for name, one in Net().named_parameters()}


class Pair:
    """The same model in one process and under FSDP2, with the same optimizer."""

    def __init__(self, placement: str = "fsdp2", name: str | type = NAME, **options: Any) -> None:
        self.alone, self.model = Net(), place(Net(), placement, **options)
        self.reference = dist_optim.build_optimizer(self.alone, name, process_group=own_group(), **OPTIONS)
        self.optimizer = dist_optim.build_optimizer(self.model, name, reduce_to_owner=True, **OPTIONS)

    @property
    def sides(self) -> tuple[tuple[nn.Module, dist_optim.DistributedOptimizer], ...]:
        return (self.alone, self.reference), (self.model, self.optimizer)

    def backward(self, step: int, **options: Any) -> None:
        for model, _ in self.sides:
            model(gradients(step), **options).backward()

    def step(self, **options: Any) -> None:
        for _, optimizer in self.sides:
            optimizer.step()
            optimizer.zero_grad(**options)

    def assert_equal(self) -> None:
        expected = full_parameters(self.alone)
        for name, tensor in full_parameters(self.model).items():
            assert torch.equal(tensor, expected[name]), name


def weight(model: nn.Module) -> nn.Parameter:
    found = getattr(model, "module", model).get_parameter("first.weight")
    assert isinstance(found, nn.Parameter)
    return found


def loops_of_people(pair: Pair) -> None:
    pair.backward(0)
    assert isinstance(weight(pair.model).grad._local_tensor, AtOwner)  # type: ignore[union-attr]
    pair.step()
    pair.backward(1)
    pair.backward(2)  # accumulates
    norms = [optimizer.clip_grad_norm_(3.0) for _, optimizer in pair.sides]
    assert torch.equal(*norms)
    pair.step(set_to_none=False)
    pair.backward(3, without="second")
    pair.backward(0, without="first")
    pair.step()
    pair.backward(1)
    for model, _ in pair.sides:
        for one in model.parameters():
            if one.grad is not None:
                one.grad.mul_(0.5)
                torch._foreach_div_([one.grad], 4)
    pair.step()
    pair.backward(2)
    pair.assert_equal()
    pair.step()
    pair.assert_equal()


def test_loops_end_as_in_one_process(three_ranks: RankPool) -> None:
    three_ranks.run(run, loops_of_people)


def run(body: Callable[[Pair], None]) -> None:
    body(Pair())


def loops_under_ddp(placement: str) -> None:
    pair = Pair(placement, find_unused_parameters=True, bucket_cap_mb=0.003)
    pair.backward(0)
    assert isinstance(weight(pair.model).grad, AtOwner)
    pair.step()
    with pair.model.no_sync():  # type: ignore[operator]
        pair.backward(1)
    pair.backward(2)
    assert torch.equal(*(optimizer.clip_grad_norm_(3.0) for _, optimizer in pair.sides))
    pair.step()
    pair.backward(3, without="second")
    pair.step()
    pair.backward(1)
    with pytest.raises(UnsupportedError, match=r"no_sync"):
        pair.model(gradients(2)).backward()


@pytest.mark.parametrize("placement", ["ddp", "ddp bucket view"])
def test_loops_under_ddp_end_as_in_one_process(placement: str, three_ranks: RankPool) -> None:
    three_ranks.run(loops_under_ddp, placement)


def accumulates_without_reducing(pair: Pair) -> None:
    pair.model.set_requires_gradient_sync(False)  # type: ignore[operator]
    pair.backward(0)
    pair.model.set_requires_gradient_sync(True)  # type: ignore[operator]
    pair.backward(1)
    pair.step()
    pair.assert_equal()


def test_gradients_that_the_engine_accumulates(two_ranks: RankPool) -> None:
    two_ranks.run(run, accumulates_without_reducing)


def changes_weights_before_the_step(pair: Pair) -> None:
    for step, is_counted in enumerate((False, True)):  # torch does not count what is written through .data
        pair.backward(step)
        with torch.no_grad():
            for one in (weight(pair.alone), weight(pair.model)):
                (one if is_counted else one.data).mul_(0.5)
        pair.step()
        pair.assert_equal()


def test_weights_that_are_changed_between_backward_and_step(two_ranks: RankPool) -> None:
    two_ranks.run(run, changes_weights_before_the_step)


def counts_what_travels(pair: Pair) -> tuple[int, int]:
    """Elements that the ranks send in a step, and those that are on the way back."""
    sent = []
    original = dist.isend

    def isend(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **options)

    pair.backward(0)
    with mock.patch.object(dist, "isend", isend):
        pair.step()
    return sum(sent), sum(bucket.scattered_bytes for bucket in pair.optimizer.plan.buckets) // 4


def returned(body: Callable[[Pair], Any], **options: Any) -> Any:
    return body(Pair(**options))


def test_nothing_travels_in_a_step_but_the_way_back(two_ranks: RankPool) -> None:
    found = two_ranks.run(returned, counts_what_travels)
    unused = 3 * 3 + 3
    assert sum(sent for sent, _ in found) <= found[0][1]
    assert sum(sent for sent, _ in found) > found[0][1] - 2 * unused


def reads_gradients(pair: Pair) -> None:
    pair.backward(0)
    gradient = weight(pair.model).grad
    assert gradient is not None
    readers: list[Callable[[], object]] = [
        lambda: torch.nn.utils.clip_grad_norm_(pair.model.parameters(), 1.0),
        lambda: gradient.norm(),
        lambda: gradient.to_local().sum().item(),  # type: ignore[attr-defined]
        lambda: gradient.full_tensor(),  # type: ignore[attr-defined]
        lambda: copy.deepcopy(gradient),
        lambda: gradient.add_(1.0),
    ]
    for read in readers:
        with pytest.raises(UnsupportedError, match=r"'first\.\w+'.*optimizer\.clip_grad_norm_"):
            read()
    pair.step()
    pair.assert_equal()


def test_who_reads_a_gradient_is_told_where_it_is(two_ranks: RankPool) -> None:
    two_ranks.run(run, reads_gradients)


class KeepsGradients(torch.optim.Optimizer):
    """Steps by the difference to the gradient before, which it keeps as it was given."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    before = self.state[one].get("before", torch.zeros_like(one))
                    one.sub_(one.grad - 0.5 * before, alpha=group["lr"])
                    self.state[one]["before"] = one.grad


def keeps_what_it_is_given() -> None:
    pair = Pair(name=KeepsGradients)
    assert pair.optimizer.plan.owners
    for step in range(3):
        pair.backward(step)
        pair.step()
        pair.assert_equal()


def test_a_class_that_keeps_its_gradients(two_ranks: RankPool) -> None:
    two_ranks.run(keeps_what_it_is_given)


def half_precision_in_layers() -> None:
    """Weights come anew where layers compute in another dtype; gradients as the plain exchange has them."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = [place(Net(), "fsdp2", mp_policy=policy) for _ in range(2)]
    built = [
        dist_optim.build_optimizer(model, NAME, reduce_to_owner=is_sent, **OPTIONS)
        for model, is_sent in zip(models, (False, True), strict=True)
    ]
    for step in range(3):
        for model, optimizer in zip(models, built, strict=True):
            model(gradients(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = map(full_parameters, models)
    assert isinstance(built[1].route_of_gradients, str)
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_layers_in_half_precision(two_ranks: RankPool) -> None:
    two_ranks.run(half_precision_in_layers)


def where_it_is_not_served() -> None:
    for placement, reason in (("fsdp1", "only fully_shard"), ("hsdp", "HSDP sums"), ("fsdp2 columns", "first dim")):
        model = place(Net(), placement)
        optimizer = dist_optim.build_optimizer(model, NAME, reduce_to_owner=True, **OPTIONS)
        assert reason in optimizer.route_audit(), optimizer.route_audit()


def test_elsewhere_the_audit_says_why_not(four_ranks: RankPool) -> None:
    four_ranks.run(where_it_is_not_served)


def ends_with_its_optimizer() -> None:
    model = place(Net(), "fsdp2")
    first = dist_optim.build_optimizer(model, NAME, reduce_to_owner=True, **OPTIONS)
    dist_optim.build_optimizer(model, NAME, **OPTIONS)
    assert not any(hasattr(unit, to_owners.MARK) for unit in units_of(model))
    del first
    again = dist_optim.build_optimizer(model, NAME, reduce_to_owner=True, **OPTIONS)
    model(gradients(0)).backward()
    assert isinstance(weight(model).grad._local_tensor, AtOwner)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match="reduce_to_owner"):
        again.add_param_group({"params": [model.get_parameter("second.bias")]})
    model.zero_grad()
    del again
    gc.collect()
    model(gradients(0)).backward()
    assert float(weight(model).grad.norm()) > 0  # type: ignore[union-attr]


def test_a_model_is_free_when_its_optimizer_is_gone(two_ranks: RankPool) -> None:
    two_ranks.run(ends_with_its_optimizer)


def loses_what_was_there(column: to_owners._Column, parts: Any, output: Tensor) -> None:
    original_sum(dataclasses.replace(column, is_added=False), parts, output)


original_sum = to_owners._sum


def accumulates_wrongly() -> None:
    with mock.patch.object(to_owners, "_sum", loses_what_was_there), pytest.raises(AssertionError):
        loops_of_people(Pair())


def test_a_lost_accumulation_is_seen(three_ranks: RankPool) -> None:
    three_ranks.run(accumulates_wrongly)
