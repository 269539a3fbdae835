"""FSDP2's backward sends gradients to their owners, in place of the parts of them that ranks would get.

An all-to-all and a sum have the bytes of a reduce-scatter. FSDP2 hands a unit's gradients over in one tensor of as
many rows as ranks: row r has what rank r would get of each parameter, so that a column range over all rows is one
parameter's whole gradient. Its owner gets that; of what is stepped on slices each rank gets its row, as ever. While a
unit is gathered its owner copies the parameters too, where they have the dtype in which they are stepped: then nothing
travels inside the step but the way back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import UnsupportedError
from dist_optim.exchange.rooms import Room, Rooms
from dist_optim.inside_backward.messages import mean_of, send
from dist_optim.inside_backward.to_owners_ddp import hook_of, send_buckets_to_owners
from dist_optim.layouts.freezing_fsdp2 import units_of
from dist_optim.overrides import check
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.stepping.at_owner import AtOwner, Whole
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["ToOwners", "send_to_owners", "stop_sending"]

MARK = "_dist_optim_to_owners"
"""Attribute of an FSDP2 unit: what sends its gradients to owners."""


def send_to_owners(optimizer: DistributedOptimizer, model: nn.Module) -> str:
    """Let FSDP2 send gradients of whole tensors to their owners. Local; on all ranks alike.

    Args:
        optimizer: Built on the model.
        model: As it was wrapped.

    Returns:
        What the audit says of it: how many go there, or why none does.
    """
    stop_sending(model)
    units = units_of(model)
    held = optimizer.holdings
    if num_ranks(held.process_group) == 1 or not held.plan.owners:
        return "no gradient has to travel"
    if any(held.placed[index].member is not None for index in held.plan.owners):
        return "gradients travel in step(): experts and filters are stepped as matrices of their own"
    wholes = {
        id(held.placed[index].parameter): Whole(held.placed[index], owner, held.rank, held.spec.is_undescribed)
        for index, owner in held.plan.owners.items()
    }
    if isinstance(model, DistributedDataParallel):
        reason = send_buckets_to_owners(optimizer, model, wholes)
        optimizer.training_step.expect_at_owners()
        return f"gradients are reduced on every rank: {reason}" if reason else _line(len(wholes), len(wholes), [])
    if not units:
        return "gradients travel in step(): only fully_shard (FSDP2) and DistributedDataParallel send them to owners"
    rooms = Rooms()
    served, reasons = 0, list[str]()
    for unit in units:
        if reason := _why_not(unit, held.process_group):
            reasons.append(reason)
        elif owned := [one for one in unit.fsdp_params if _is_served(one) and id(one.sharded_param) in wholes]:
            ToOwners(unit, optimizer, wholes, rooms)
            served += len(owned)
    if served:
        optimizer.training_step.expect_at_owners()
    return _line(served, len(wholes), reasons)


def _line(served: int, num_wholes: int, reasons: Sequence[str]) -> str:
    line = f"gradients of {served} of {num_wholes} whole tensors go to their owners inside backward"
    return line if served == num_wholes else f"{line}, others in step(): {_others(reasons)}"


def stop_sending(model: nn.Module) -> None:
    """Let FSDP2 reduce again as it did, where an earlier optimizer of this model has owners. Local."""
    for unit in units_of(model):
        if (earlier := vars(unit).get(MARK)) is not None:
            earlier.remove()
    if (hook := hook_of(model)) is not None:
        hook.stop()


def _others(reasons: Sequence[str]) -> str:
    return reasons[0] if reasons else "they are not cut along their first dim by FSDP2"


def _why_not(unit: Any, process_group: dist.ProcessGroup | None) -> str:
    """Why this unit's gradients cannot be sent to owners; empty where they can."""
    check("FSDP2, to owners")
    mesh = unit.mesh_info.mesh
    if mesh.ndim != 1:
        return "HSDP sums over replicas what each rank has"
    if dist.get_process_group_ranks(mesh.get_group()) != dist.get_process_group_ranks(process_group):
        return "the plan has other ranks than their process group, as where several mesh axes shard the model"
    if any(one.offload_to_cpu for one in unit.fsdp_params):
        return "they are offloaded to the CPU"
    if not type(unit._reduce_scatter_comm).__name__.startswith("Default"):
        return "their unit has a reduce-scatter of its own (set_custom_reduce_scatter)"
    return ""


def _is_served(one: Any) -> bool:
    return bool(one.fsdp_placement.dim == 0 and not one.is_dtensor)


@dataclass(frozen=True, slots=True)
class _Column:
    """One parameter's part of each row."""

    start: int
    numel: int
    owned: Whole | None
    """None where each rank gets its row of it."""
    is_added: bool
    """Whether the owner adds it to what it has: gradients are accumulated."""

    def is_of(self, rank: int) -> bool:
        """Whether this rank gets any of it."""
        return self.owned is None or self.owned.owner == rank

    def of(self, rows: Tensor, rank: int) -> Tensor:
        """What ``rank`` gets of it."""
        return rows[slice(None) if self.owned else rank, self.start : self.start + self.numel]


class ToOwners(ReduceScatter):
    """In place of one unit's reduce-scatter; ``remove`` puts that back.

    Args:
        unit: FSDP2's param group.
        optimizer: When it is gone, the unit reduces as it did.
        wholes: What is owned, by the id of its parameter.
        rooms: Memory of the messages on the host, for all units together.
    """

    def __init__(self, unit: Any, optimizer: DistributedOptimizer, wholes: Mapping[int, Whole], rooms: Rooms) -> None:
        self._unit = weakref.ref(unit)
        self._optimizer = weakref.ref(optimizer)
        self._wholes = wholes
        self._group = group = optimizer.holdings.process_group
        self._rooms = rooms
        self._rank, self._num_ranks = own_rank(group), num_ranks(group)
        self._bringing: list[Any] = []
        self._sent: dict[int, tuple[Any, Whole]] = {}
        self._input: Tensor | None = None
        self._original = unit._reduce_scatter_comm
        self._handles = [_watched(one.sharded_param, self) for one in unit.fsdp_params]
        unit._reduce_scatter_comm = self
        unit.post_backward = _before(unit, self)
        setattr(unit, MARK, self)

    def remove(self) -> None:
        """Let the unit reduce as it did."""
        unit = self._unit()
        for handle in self._handles:
            handle.remove()
        if unit is not None:
            unit._reduce_scatter_comm = self._original
            del unit.post_backward
            delattr(unit, MARK)

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the gradients of all rows, then for this rank's row."""
        if device.type == "cpu" and self._input is None:
            (numel,) = size
            self._input = self._rooms.take(int(numel), dtype)
            return self._input[:numel]
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def before_reduction(self) -> None:
        """While the unit is gathered: note what brings a gradient, and take the values of what this rank owns."""
        unit = self._unit()
        assert unit is not None
        self._bringing = [] if self._optimizer() is None else _bringing(unit)
        for one in self._bringing:
            owned = self._wholes.get(id(one.sharded_param))
            if owned is not None and _is_served(one):
                part, full = one.sharded_param._local_tensor, one._unsharded_param.detach()
                is_same = unit.is_unsharded and full.dtype == part.dtype and type(full) is Tensor
                owned.take_values(full if is_same else None, part)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """FSDP2's reduce-scatter: the output has this rank's row of what is stepped on slices. Collective."""
        columns = self._columns(input_tensor.numel()) if op == dist.ReduceOp.AVG else []
        if columns:
            self._send(columns, input_tensor.view(self._num_ranks, -1), output_tensor)
        else:
            self._assert_none_waits()
            self._original(output_tensor, input_tensor, group, op, async_op)
        if self._input is not None:
            self._rooms.give_back(self._input)
            self._input = None

    def _columns(self, numel: int) -> list[_Column]:
        """Of the parameters that bring a gradient; none where FSDP2 counts them in another way."""
        columns, start = list[_Column](), 0
        for one in self._bringing:
            size, stored = one._orig_size, one.sharded_param.grad
            row = -(-size[0] // self._num_ranks) * size[1:].numel()
            is_there = stored is not None and isinstance(stored._local_tensor, AtOwner)
            is_owned = _is_served(one) and (stored is None or is_there)
            owned = self._wholes.get(id(one.sharded_param)) if is_owned else None
            columns.append(_Column(start, row, owned, is_there))
            start += row
        is_known = start * self._num_ranks == numel
        return columns if is_known and any(column.owned for column in columns) else []

    def _send(self, columns: Sequence[_Column], rows: Tensor, output: Tensor) -> None:
        room = Room(self._rooms)
        pieces = [[one.of(rows, rank) for one in columns if one.is_of(rank)] for rank in range(len(rows))]
        _, arrived = send(pieces, self._rank, self._group, lambda _, numel: room.flat(numel, rows.dtype, rows.device))
        for column, parts in zip([one for one in columns if one.is_of(self._rank)], arrived(), strict=True):
            _sum(column, parts, output)
        self._note_sent(columns)
        room.close()

    def _note_sent(self, columns: Sequence[_Column]) -> None:
        for one, column in zip(self._bringing, columns, strict=True):
            if column.owned is not None:
                column.owned.is_arriving = True
                self._sent[id(one.sharded_param)] = one, column.owned

    def _assert_none_waits(self) -> None:
        for one in self._bringing:
            stored = one.sharded_param.grad
            if stored is not None and isinstance(stored._local_tensor, AtOwner):
                raise UnsupportedError(
                    f"The gradient of {stored._local_tensor.whole.name!r} lies with its owner, and FSDP2 reduces its "
                    "next one in another way (another divide factor, or dtype). Change that between steps only, after "
                    "zero_grad(); or build with reduce_to_owner=False."
                )

    def on_gradient(self, parameter: nn.Parameter) -> None:
        """FSDP2 has given the parameter what it takes for its gradient."""
        one, whole = self._sent.pop(id(parameter), (None, None))
        if one is None or whole is None:
            return
        whole.is_arriving = False
        stored = parameter.grad
        assert isinstance(stored, DTensor)
        if not isinstance(stored._local_tensor, AtOwner):
            parameter.grad = one.to_sharded_dtensor(AtOwner(whole, stored._local_tensor))


def _sum(column: _Column, parts: Sequence[Tensor], output: Tensor) -> None:
    """The mean over ranks, in their order, of what each has sent for a column, where it is read."""
    first = parts[0]
    if column.owned is None:
        target = output[column.start : column.start + column.numel]
    else:
        target = column.owned.land(first.size(0), first.size(1), first.device, column.is_added)
    is_direct = not column.is_added and target.dtype == first.dtype
    total = mean_of(parts, target if is_direct else None)
    if column.is_added:
        target += total.to(target.dtype)
    elif not is_direct:
        target.copy_(total)


def _bringing(unit: Any) -> list[Any]:
    """The unit's parameters that bring a gradient to the reduction that follows, in FSDP2's order."""
    if not unit.reduce_grads:
        return []
    is_filled = getattr(unit, "reduce_scatter_unused_params", False)
    return [
        one
        for one in unit.fsdp_params
        if hasattr(one, "_unsharded_param")
        and (
            one.unsharded_accumulated_grad is not None
            or one.unsharded_param.grad is not None
            or (is_filled and one.unsharded_param.requires_grad)
        )
    ]


def _before(unit: Any, comm: ToOwners) -> Callable[..., None]:
    """FSDP2's own ``post_backward`` of the unit, told to ``comm`` before."""
    own = weakref.ref(unit)

    def post_backward(*unused: Any) -> None:
        one = own()
        if one is not None:
            comm.before_reduction()
            type(one).post_backward(one, *unused)

    return post_backward


def _watched(parameter: nn.Parameter, comm: ToOwners) -> Any:
    is_frozen = not parameter.requires_grad
    parameter.requires_grad_(True)  # torch takes no hook otherwise, and keeps it
    handle = parameter.register_post_accumulate_grad_hook(comm.on_gradient)
    parameter.requires_grad_(not is_frozen)
    return handle
