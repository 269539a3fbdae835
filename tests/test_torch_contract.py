"""What torch and others expect of any optimizer: state to look at, torch's own doors to it, hooks, methods."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from any_classes import Averaging
from placements import full_parameters, own_group, place
from sessions import OPTIONS, Net, batch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_doors
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.tensor import DTensor

import dist_optim
from dist_optim.checkpoint import torch_state_dict
from dist_optim.errors import StateDictError, UnsupportedError
from dist_optim.testing import RankPool

NAMES = ("adamw_torch", "galore_adamw", "schedule_free_adamw")
PLACEMENTS = ("ddp", "fsdp1", "fsdp2 units")
FULL = torch_doors.StateDictOptions(full_state_dict=True)
OFFLOADED = torch_doors.StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = torch_doors.StateDictOptions(flatten_optimizer_state_dict=True)


def made(placement: str, name: str | type = "adamw_torch", **options: Any) -> tuple[nn.Module, Any]:
    model = place(Net(), placement)
    options = options or OPTIONS.get(str(name), {"lr": 1e-2})
    group = own_group() if placement == "none" and dist.is_initialized() else None
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False, process_group=group, **options)
    optimizer.train()
    return model, optimizer


def train(model: nn.Module, optimizer: Any, steps: range) -> dict[str, Tensor]:
    for step in steps:
        optimizer.zero_grad()
        model(*batch(step), True).backward()
        optimizer.step()
    return full_parameters(model)


def copied(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for old, new in zip(source.parameters(), target.parameters(), strict=True):
            new.copy_(old)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def through_torch(placement: str, name: str, options: Any, folder: str) -> list[str]:
    """Read six times, load into another one that has trained elsewhere, go on: as one process does, uninterrupted."""
    expected = train(*made("none", name), range(4))
    model, optimizer = made(placement, name)
    train(model, optimizer, range(2))
    for _ in range(6):
        saved = torch_doors.get_optimizer_state_dict(model, optimizer, options=options)
    fresh, resumed = made(placement, name)
    copied(model, fresh)
    if folder:
        dcp.save({"optim": saved}, checkpoint_id=folder)
        saved = torch_doors.get_optimizer_state_dict(fresh, resumed, options=options)
        dcp.load({"optim": saved}, checkpoint_id=folder)
    else:
        train(fresh, resumed, range(2, 3))
        copied(model, fresh)
    torch_doors.set_optimizer_state_dict(fresh, resumed, saved, options=options)
    return differing(train(fresh, resumed, range(2, 4)), expected) + differing(
        train(model, optimizer, range(2, 4)), expected
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_reading_and_loading_through_torch_never_steps(two_ranks: RankPool, placement: str, name: str) -> None:
    for options in (None, FULL, FLAT):
        assert two_ranks.run(through_torch, placement, name, options, "") == [[], []], options


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_torch_saves_and_loads_it_into_a_fresh_one(two_ranks: RankPool, placement: str, tmp_path: Any) -> None:
    for name in NAMES:
        assert two_ranks.run(through_torch, placement, name, None, str(tmp_path / name)) == [[], []]


def saved_by_two(placement: str, folder: str) -> None:
    model, optimizer = made(placement)
    train(model, optimizer, range(2))
    dcp.save({"optim": torch_doors.get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    whole = torch_doors.get_optimizer_state_dict(model, optimizer, options=OFFLOADED)
    assert bool(whole) == (dist.get_rank() == 0)
    if whole:
        torch.save({"optim": whole, "model": full_parameters_here(model)}, f"{folder}.pt")
    else:
        full_parameters_here(model)


def full_parameters_here(model: nn.Module) -> dict[str, Tensor]:
    return full_parameters(model)


def resumed_by(placement: str, folder: str) -> list[str]:
    """On four ranks, from what two ranks have written by torch's own means."""
    expected = train(*made("none"), range(4))
    stored = torch.load(f"{folder}.pt", weights_only=True)
    alone, upstream = Net(), torch.optim.AdamW
    alone.load_state_dict(stored["model"])
    plain = upstream(alone.parameters(), **OPTIONS["adamw_torch"])
    torch_doors.set_optimizer_state_dict(alone, plain, stored["optim"])
    found = differing(train(alone, plain, range(2, 4)), expected)
    start = Net()
    start.load_state_dict(stored["model"])
    model = place(start, placement)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", print_audit=False, **OPTIONS["adamw_torch"])
    room = torch_doors.get_optimizer_state_dict(model, optimizer)
    dcp.load({"optim": room}, checkpoint_id=folder)
    torch_doors.set_optimizer_state_dict(model, optimizer, room)
    return found + differing(train(model, optimizer, range(2, 4)), expected)


@pytest.mark.parametrize(
    ("first", "then"),
    [("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp1", "fsdp1"), ("fsdp1", "fsdp1 hybrid")],
)
def test_another_world_size_and_plain_torch_go_on(
    two_ranks: RankPool, four_ranks: RankPool, first: str, then: str, tmp_path: Any
) -> None:
    two_ranks.run(saved_by_two, first, str(tmp_path / "saved"))
    assert four_ranks.run(resumed_by, then, str(tmp_path / "saved")) == [[]] * 4


def through_fsdp1(placement: str) -> list[str]:
    expected = train(*made("none", "galore_adamw"), range(4))
    model, optimizer = made(placement, "galore_adamw")
    train(model, optimizer, range(2))
    fsdp = FullyShardedDataParallel
    kinds = (
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=True),
        FullOptimStateDictConfig(rank0_only=True),
    )
    with fsdp.state_dict_type(model, *kinds):
        saved = fsdp.optim_state_dict(model, optimizer)
        fresh, resumed = made(placement, "galore_adamw")
        copied(model, fresh)
    with fsdp.state_dict_type(fresh, *kinds):
        resumed.load_state_dict(fsdp.optim_state_dict_to_load(fresh, resumed, saved))
    return differing(train(fresh, resumed, range(2, 4)), expected)


def test_fsdp1s_own_methods_serve_it(two_ranks: RankPool, four_ranks: RankPool) -> None:
    assert two_ranks.run(through_fsdp1, "fsdp1") == [[]] * 2
    assert four_ranks.run(through_fsdp1, "fsdp1 hybrid") == [[]] * 4


def whole_under_ddp() -> list[str]:
    """What every rank of DDP returns loads into upstream's class, and into FSDP2."""
    model, optimizer = made("ddp")
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    weights, expected = full_parameters(model), train(*made("none"), range(4))
    found = []
    for placement in ("upstream", "fsdp2", "none"):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        net = Net()
        net.load_state_dict(weights)
        if placement == "upstream":
            target: Any = torch.optim.AdamW(net.parameters(), **OPTIONS["adamw_torch"])
        else:
            net = place(net, placement)  # type: ignore[assignment]
            group = own_group() if placement == "none" else None
            target = dist_optim.build_optimizer(
                net, "adamw_torch", print_audit=False, process_group=group, **OPTIONS["adamw_torch"]
            )
        target.load_state_dict(state)
        found += [f"{placement}: {name}" for name in differing(train(net, target, range(2, 4)), expected)]
    return found


def test_ddps_state_dict_is_complete_and_loads_anywhere(two_ranks: RankPool) -> None:
    assert two_ranks.run(whole_under_ddp) == [[], []]


def resumed_from_upstream(placement: str) -> list[str]:
    alone = Net()
    upstream = torch.optim.AdamW(alone.parameters(), **OPTIONS["adamw_torch"])
    train(alone, upstream, range(2))
    net = Net()
    net.load_state_dict(alone.state_dict())
    model = place(net, placement)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", print_audit=False, **OPTIONS["adamw_torch"])
    optimizer.load_state_dict(copy.deepcopy(upstream.state_dict()))
    assert optimizer.num_steps == 2
    return differing(train(model, optimizer, range(2, 4)), train(alone, upstream, range(2, 4)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_upstreams_state_dict_is_taken_over(two_ranks: RankPool, placement: str) -> None:
    assert two_ranks.run(resumed_from_upstream, placement) == [[], []]


def seen_state(placement: str) -> tuple[int, int, list[str]]:
    model, optimizer = made(placement)
    assert not optimizer.state and len(optimizer.state) == 0
    train(model, optimizer, range(1))
    held = list(optimizer.state)
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        and not torch.equal(optimizer.state[parameter]["exp_avg"], local(parameter.grad) * 0.1)
    ]
    for refused in (
        lambda: optimizer.state[held[0]].update(mine=1),
        lambda: optimizer.state.clear(),
        lambda: setattr(optimizer, "state", {}),
    ):
        with pytest.raises(UnsupportedError, match="load_state_dict"):
            refused()
    assert optimizer.state[torch.zeros(1)] == {} and optimizer.state.get(torch.zeros(1)) is None
    return len(held), sum(1 for _ in model.parameters()), wrong


def local(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("placement", ["ddp", "fsdp2 units"])
def test_state_shows_what_this_rank_steps(two_ranks: RankPool, placement: str) -> None:
    (mine, count, wrong), (theirs, _, also_wrong) = two_ranks.run(seen_state, placement)
    assert not wrong and not also_wrong
    assert (mine + theirs == count and mine and theirs) if placement == "ddp" else mine == theirs == count


def own_methods(placement: str) -> list[str]:
    alone = Net()
    upstream = Averaging(alone.parameters())
    train(alone, upstream, range(3))
    upstream.weight = 0.25
    train(alone, upstream, range(3, 5))
    upstream.swap()
    expected = {name: p.detach().clone() for name, p in alone.named_parameters()}
    model, optimizer = made(placement, Averaging, lr=0.1)
    train(model, optimizer, range(3))
    optimizer.weight = 0.25
    assert optimizer.weight == 0.25 and optimizer.num_cleared == 3 and optimizer.name_of_it() == "averaging"
    train(model, optimizer, range(3, 5))
    optimizer.swap()
    found = differing(full_parameters(model), expected)
    with pytest.raises(UnsupportedError, match="changes gradients"):
        optimizer.halve_gradients()
    with pytest.raises(AttributeError, match="no attribute 'sharpen'"):
        optimizer.sharpen()
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_classes_own_methods_reach_it(two_ranks: RankPool, placement: str) -> None:
    assert two_ranks.run(own_methods, placement) == [[], []]


def test_hooks_closures_copies_and_averages() -> None:
    model, optimizer = made("none")
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before state"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(f"before load {state.pop('mine')}"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after load"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(*batch(0), True)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), Net()(*batch(0), True))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before step", "after step", "before state", "before load 1", "after load"]
    for copying in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UnsupportedError, match="cannot be copied or pickled.*state_dict"):
            copying(optimizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=1)
    train(model, optimizer, range(1))
    schedule.step()
    average.update_parameters(model)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("given", [None, 3, {}, {"state": {}}, {"model": 1}])
def test_what_is_no_state_dict_is_refused(given: Any) -> None:
    _, optimizer = made("none")
    with pytest.raises(StateDictError, match="no optimizer's state dict"):
        optimizer.load_state_dict(given)


def test_flat_keys_are_taken_apart_in_one_pass_and_by_the_longest_name() -> None:
    """``a`` and ``a.b`` are both parameters' names; each key is looked at once."""
    flat = {"state.a.b.exp_avg": 1, "state.a.step": 2, "param_groups.a.b.lr": 0.1, "param_groups.a.lr": 0.1, "other": 0}
    looks = 0

    class Counted(dict[str, Any]):
        def items(self) -> Any:
            nonlocal looks
            for item in super().items():
                looks += 1
                yield item

    held = mock.Mock(names_by_group=lambda: [["a", "a.b", *(f"layer{number}" for number in range(50))]])
    found = torch_state_dict._unflattened(mock.Mock(holdings=held), Counted(flat))
    assert found["state"] == {"a.b": {"exp_avg": 1}, "a": {"step": 2}}
    assert found["param_groups"][0]["lr"] == 0.1 and looks == len(flat)
