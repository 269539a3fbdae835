"""Parameters on meshes of several axes: where the parts lie, who holds copies, and what the ranks compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as torch_doors
from cases import all_cases
from parity import (
    Case,
    Net,
    build_subject,
    gradients,
    make_model,
    reference_history,
    run_case,
    run_second_life,
    take_step,
    with_experts,
)
from placements import full_parameters, inject, mesh_of, own_group, place
from test_checkpoint import go_on, run_to_the_break
from test_clipping import clips_as_torch_does
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import dist_optim
from dist_optim.errors import DistOptimError, UnsupportedLayoutError
from dist_optim.exchange.norms import combine_norms
from dist_optim.layouts import BoxShard, DimShard, box_shard, detect, detect_mesh
from dist_optim.layouts.layout import boxes_on, chunk_of
from dist_optim.ranks.agreement import own_rank
from dist_optim.testing import RankFailure, RankPool, assert_equal

CASE = {case.name: case for case in reversed(all_cases())}
MESH = ("shard", "tp")
UNDER_FSDP2 = _StridedShard(0, split_factor=2)


def on_mesh(full: Tensor, placements: Sequence[Placement]) -> nn.Module:
    model = nn.Module()
    placed = distribute_tensor(full, mesh_of("cpu", MESH), placements, src_data_rank=None)
    model.weight = nn.Parameter(placed, requires_grad=False)
    return model


def boxes_are_where_dtensor_puts_them() -> None:
    kinds: list[tuple[Placement, Placement]] = [
        *((one, other) for one in (Shard(0), Shard(1)) for other in (Shard(0), Shard(1), Replicate())),
        (Replicate(), Shard(1)),
        (UNDER_FSDP2, Shard(0)),
    ]
    for placements in kinds:
        for rows, columns in ((8, 4), (7, 5), (2, 3), (1, 1)):
            if placements[0] == UNDER_FSDP2 and rows % 4:
                continue  # other rows than FSDP2 has there: below
            full = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
            placed = detect(on_mesh(full, placements))["weight"]
            part = placed.layout.view_of(full, own_rank(placed.process_group))
            assert_equal(placed.local(), part)
            assert placed.layout.numel_on(full.shape, own_rank(placed.process_group)) == part.numel()


def test_boxes_are_where_dtensor_puts_them(four_ranks: RankPool) -> None:
    four_ranks.run(boxes_are_where_dtensor_puts_them)


def boxes_are_where_fsdp2_over_tensor_parallelism_puts_them() -> None:
    for rows in (8, 7, 5, 3, 1):
        net = Net(((rows, 6), (6, rows)), ((rows,), (rows, 3)))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
        full = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        for name, placed in detect(place(net, "fsdp2 tp")).items():
            rank, layout = dist.get_rank(), placed.layout
            assert isinstance(layout, BoxShard) and placed.process_group is None, name
            part = layout.view_of(full[name], rank)
            assert_equal(placed.local(), part if part.numel() else torch.empty_like(placed.local()))
            assert layout.copies == (1 if ("linears" in name and name != "linears.1.bias") else 2), name
            boxes = boxes_on(layout, placed.shape, rank)
            assert sum(torch.Size(box.sizes).numel() for box in boxes) == placed.local().numel()


def test_boxes_are_where_fsdp2_over_tensor_parallelism_puts_them(four_ranks: RankPool) -> None:
    """Sizes that do not divide included: tensor parallelism cuts first, and FSDP2 cuts its chunk."""
    four_ranks.run(boxes_are_where_fsdp2_over_tensor_parallelism_puts_them)


def layouts_of_one_axis() -> None:
    model = on_mesh(torch.zeros(4, 4), (Replicate(), Shard(0)))
    apart = detect(model, shares_replicas=False)["weight"]
    assert apart.layout == DimShard(dim=0, world_size=2)
    assert apart.process_group is mesh_of("cpu", MESH).get_group("tp")
    shared = detect(model)["weight"]
    assert shared.layout == BoxShard(((0, 2),), ((0,), (1,), (0,), (1,)))
    assert shared.process_group is None and shared.layout.copies == 2


def test_replicas_share_the_work_or_each_do_it_all(four_ranks: RankPool) -> None:
    four_ranks.run(layouts_of_one_axis)


def refusal(placements: Sequence[Placement], shape: tuple[int, ...]) -> str:
    model = on_mesh(torch.zeros(shape), (Shard(0), Replicate()))
    mesh = mesh_of("cpu", MESH)
    if any(one.is_partial() for one in placements):
        model.weight = nn.Parameter(DTensor.from_local(torch.zeros(shape), mesh, placements))
    else:
        model = on_mesh(torch.zeros(shape), placements)
        model.weight.requires_grad_()
    with pytest.raises(UnsupportedLayoutError) as caught:
        dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("placements", "shape", "message"),
    [
        ((Shard(0), Partial()), (4, 4), "one term of a sum.*redistribute it to Replicate"),
        ((UNDER_FSDP2, Replicate()), (8, 4), "several blocks of rows.*parallelize_module first"),
    ],
)
def test_what_is_no_box_is_refused_on_all_ranks(
    placements: Sequence[Placement], shape: tuple[int, ...], message: str, four_ranks: RankPool
) -> None:
    for text in four_ranks.run(refusal, placements, shape):
        assert re.search(message, text), text


def what_stays_apart() -> tuple[str, str, str]:
    """Of what moves into backward: refused, or said by the audit not to."""
    case = CASE["adamw_torch"]
    model = place(make_model(case), "fsdp2 tp")
    with pytest.raises(DistOptimError) as caught:
        dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, fused_backward=True, print_audit=False)
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=0.1, reduce_to_owner=True, print_audit=False)
    with pytest.raises(DistOptimError) as layerwise:
        dist_optim.build_optimizer(
            model, "galore_adamw_layerwise", lr=0.1, rank=4, target_modules="all-linear", print_audit=False
        )
    return str(caught.value), str(layerwise.value), optimizer.route_audit()


def test_nothing_moves_into_backward_on_a_mesh(four_ranks: RankPool) -> None:
    for refused, layerwise, audit in four_ranks.run(what_stays_apart):
        assert "several mesh axes. Shard it over one, or leave fused_backward out" in refused
        assert "Shard it over one. Or use galore_adamw, the same" in layerwise
        assert "gradients of 0 of" in audit and "others in step(): the plan has other ranks" in audit


def test_a_part_of_another_shape_than_its_box_is_refused() -> None:
    """DTensor's own cut of nine rows by 4 x 2 ranks leaves the last one a row that is not in its box."""
    layout = BoxShard(((0, 2), (0, 4)), tuple((tp, shard) for shard in range(4) for tp in range(2)))
    part: Any = SimpleNamespace(name="weight", shape=torch.Size([9]), local_shape=torch.Size([1]))
    detect_mesh._check_shape(part, layout, 7)
    with pytest.raises(UnsupportedLayoutError, match="'weight'.*cut in several blocks.*parallelize_module first"):
        detect_mesh._check_shape(part, layout, 6)


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_gradients_are_clipped_by_one_norm_of_all(name: str, four_ranks: RankPool) -> None:
    four_ranks.run(clips_as_torch_does, CASE[name], 2.0, ["fsdp2 tp"])


def clip_counting_copies_twice(case: Case) -> None:
    """The defect: each rank of tensor parallelism counts the norms of what all of them have."""

    def twice(norms: dict[int, Tensor], order: Sequence[int], *rest: Any) -> Tensor:
        doubled = {at: norm * (2**0.5 if at == order[-1] else 1) for at, norm in norms.items()}
        return combine_norms(doubled, order, *rest)

    with mock.patch("dist_optim.stepping.step.combine_norms", twice):
        clips_as_torch_does(case, 2.0, ["fsdp2 tp"])


def test_control_a_norm_that_is_counted_on_each_rank_is_noticed(four_ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="the norm of step 0 is"):
        four_ranks.run(clip_counting_copies_twice, CASE["adamw_torch"])


def run_with_boxes_off_by_a_row(case: Case, placement: str) -> list[str]:
    def next_row(size: int, parts: int, at: int) -> tuple[int, int]:
        start, length = chunk_of(size, parts, at)
        return min(start + 1, size - length), length

    with mock.patch.object(box_shard, "chunk_of", next_row):
        return run_case(case, placement)


@pytest.mark.parametrize(
    ("case", "placement"),
    [(CASE["adamw_torch"], "fsdp2 tp"), (with_experts(CASE["adamw_torch"]), "ep")],
    ids=["fsdp2 tp", "ep"],
)
def test_control_a_box_that_is_off_by_a_row_is_noticed(case: Case, placement: str, four_ranks: RankPool) -> None:
    assert all(four_ranks.run(run_with_boxes_off_by_a_row, case, placement))


PATHS = {
    "galore_adamw": (("fsdp2 tp", 4, "none", 1), ("tp", 2, "fsdp2 tp", 4)),
    "schedule_free_adamw": (("fsdp1", 2, "tp", 2), ("fsdp2 tp", 4, "hsdp", 4)),
}
"""Saved under a placement on so many ranks, and gone on with under another."""


@pytest.mark.parametrize("name", PATHS)
def test_checkpoints_do_not_know_the_mesh(
    name: str, one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    pools = {1: one_rank, 2: two_ranks, 4: four_ranks}
    for saved_under, num_saving, loaded_under, num_loading in PATHS[name]:
        folder = tmp_path / f"{saved_under} to {loaded_under}"
        pools[num_saving].run(run_to_the_break, CASE[name], saved_under, folder)
        pools[num_loading].run(go_on, CASE[name], loaded_under, folder)


def goes_on_through_torch(name: str) -> None:
    """Read by torch's functions, whole and in parts, loaded into another one, and gone on with."""
    case, half = CASE[name], 4
    expected = reference_history(case)
    for full in (False, True):
        options = torch_doors.StateDictOptions(full_state_dict=full)
        model = place(make_model(case), "fsdp2 tp")
        optimizer = build_subject(case, model)
        for step in range(half):
            take_step(case, model, optimizer, step)
        saved = torch_doors.get_optimizer_state_dict(model, optimizer, options=options)
        second = place(make_model(case), "fsdp2 tp")
        with torch.no_grad():
            for old, new in zip(detect(model).values(), detect(second).values(), strict=True):
                new.local().copy_(old.local())
        resumed = build_subject(case, second)
        torch_doors.set_optimizer_state_dict(second, resumed, saved, options=options)
        for step in range(half, case.steps):
            take_step(case, second, resumed, step)
        assert_equal(full_parameters(second), expected[-1])


@pytest.mark.parametrize("name", ["adamw_torch", "muon"])
def test_torch_reads_and_loads_the_state_on_a_mesh(name: str, four_ranks: RankPool) -> None:
    four_ranks.run(goes_on_through_torch, name)


def second_life(name: str) -> list[str]:
    return run_second_life(CASE[name], "fsdp2 tp")


def test_the_state_dict_of_each_rank_goes_on(four_ranks: RankPool) -> None:
    assert four_ranks.run(second_life, "adafactor") == [[]] * 4


def one_copy_differs(fault: str) -> str:
    """Rank 3 parts from rank 2, which holds the same part of the last parameter."""
    case = CASE["adamw_torch"]
    model = place(make_model(case), "fsdp2 tp")
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-2, print_audit=False, check_ranks_every=1)
    with pytest.raises(DistOptimError) as caught:
        for step in range(3):
            inject(model, gradients(case, make_model(case), step))
            last = optimizer.holdings.placed[-1]
            if step == 1 and dist.get_rank() == 3:
                changed = last.local() if fault == "weight" else last.local_gradient()
                assert changed is not None
                changed.add_(0.5)
            optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("weight", r"After step 2, parameter 'extra.3', slice 2 .* on rank 2 and .* on rank 3"),
        ("gradient", r"Gradients differ between ranks: the gradient of part 2 of 'extra.3' .* the same batch"),
    ],
)
def test_copies_of_a_part_are_compared(fault: str, message: str, four_ranks: RankPool) -> None:
    for text in four_ranks.run(one_copy_differs, fault):
        assert re.search(message, text), text


class Experts(nn.Module):
    """Dense layers, experts in one stack, and a bias that no engine places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.ModuleList([nn.Linear(10, 9), nn.Linear(9, 10, bias=False)])
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(4, 6, 5))])
        self.ignored = nn.Parameter(torch.randn(7, 3))


def placed_experts() -> nn.Module:
    """Experts over one axis of a mesh and cut by FSDP2 over the other; dense layers by FSDP2 over all ranks."""
    model, mesh = Experts(), mesh_of("cpu", ("efsdp", "ep"))
    model.experts[0] = nn.Parameter(distribute_tensor(model.experts[0].detach(), mesh["ep"], [Shard(0)]))
    fully_shard(model.experts, mesh=mesh["efsdp"])
    for layer in model.dense:
        fully_shard(layer, mesh=mesh_of("cpu", ("all",)))
    fully_shard(model, mesh=mesh_of("cpu", ("all",)), ignored_params={model.ignored})
    return model


def several_groups_train_as_one_process(name: str, folder: Path) -> None:
    keywords: dict[str, Any] = {"lr": 1e-2, "print_audit": False}
    plain, model = Experts(), placed_experts()
    alone = dist_optim.build_optimizer(plain, name, process_group=own_group(), **keywords)
    optimizer = dist_optim.build_optimizer(model, name, check_ranks_every=1, **keywords)
    layouts = {type(one.layout).__name__ for one in optimizer.holdings.placed}
    assert layouts == {"BoxShard", "Replicated"}
    for step in range(4):
        if step == 2:
            dist_optim.save_checkpoint(folder, model, optimizer)
            model = placed_experts()
            optimizer = dist_optim.build_optimizer(model, name, check_ranks_every=1, **keywords)
            dist_optim.load_checkpoint(folder, model, optimizer)
        generator = torch.Generator().manual_seed(step)
        full: dict[str, Tensor | None] = {
            key: torch.randn(p.shape, generator=generator) for key, p in plain.named_parameters()
        }
        full["dense.0.bias"] = None if step == 1 else full["dense.0.bias"]
        inject(model, full)
        for key, parameter in plain.named_parameters():
            gradient = full[key]
            parameter.grad = None if gradient is None else gradient.clone()
        norms = [one.clip_grad_norm_(3.0) for one in (alone, optimizer)]
        assert norms[0] > 3.0 and norms[0] == norms[1]
        alone.step()
        optimizer.step()
    assert_equal(full_parameters(model), full_parameters(plain))


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "soap"])
def test_several_process_groups_in_one_optimizer(name: str, four_ranks: RankPool, tmp_path: Path) -> None:
    four_ranks.run(several_groups_train_as_one_process, name, tmp_path / "run")


def one_of_another_group_fails() -> str:
    """Rank 3 finds a gradient that it cannot step by; ranks of other groups raise with it."""
    model = placed_experts()
    optimizer = dist_optim.build_optimizer(model, "adafactor", lr=1e-2, print_audit=False)
    inject(model, {name: torch.zeros(p.shape) for name, p in Experts().named_parameters()})
    ignored = model.get_parameter("ignored")
    if dist.get_rank() == 3:
        assert ignored.grad is not None
        ignored.grad = ignored.grad.to_sparse()
    with pytest.raises(DistOptimError) as caught:
        optimizer.step()
    return str(caught.value)


def test_ranks_of_several_groups_fail_together(four_ranks: RankPool) -> None:
    assert all("'ignored' is sparse" in text for text in four_ranks.run(one_of_another_group_fails))


def meshes_apart() -> str:
    """Two meshes that share no axis: nobody can say which ranks hold copies."""
    model = nn.ParameterList()
    own = DeviceMesh.from_group(mesh_of("cpu", ("efsdp", "ep")).get_group("ep"), "cpu")
    model.append(nn.Parameter(distribute_tensor(torch.zeros(4, 4), own, [Shard(0)])))
    model.append(nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh_of("cpu", ("all",)), [Shard(0)])))
    with pytest.raises(UnsupportedLayoutError) as caught:
        dist_optim.build_optimizer(model, "sgd", lr=1e-2, print_audit=False)
    return str(caught.value)


def test_meshes_that_fit_into_none_are_refused(four_ranks: RankPool) -> None:
    for text in four_ranks.run(meshes_apart):
        assert "Make one mesh with init_device_mesh" in text
