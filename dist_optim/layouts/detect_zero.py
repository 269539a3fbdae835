"""DeepSpeed's flat partitions: where every original parameter lies inside what ZeRO gives to an inner optimizer.

ZeRO concatenates the parameters of a param group, cuts the result into one partition a rank, and hands the partition
to the optimizer as one flat fp32 tensor: names and shapes are gone. They are found again here, and only here, from the
private attributes of the engine's wrappers. ``check_slices`` compares what was read with the model's own values.

A **call** is one ``step()`` of the inner optimizer: ZeRO-1/2 call it once a param group, ZeRO-3 once a sub-group, the
others once a training step. Updates must be written within the call: DeepSpeed copies them into the model right after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_optim.errors import UnsupportedLayoutError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import FlatRange, Layout, Replicated
from dist_optim.ranks.agreement import gather_objects, host_group, own_rank, reachable_devices
from dist_optim.ranks.together import together
from dist_optim.specs.same_bits import same

__all__ = [
    "Call",
    "ParamSlice",
    "check_slices",
    "logical_shape",
    "read_calls",
    "stored_place",
    "with_reachable_groups",
    "wrapper_kind",
]

NamedParameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """This rank's part of one original parameter, inside a tensor that the engine gives to the optimizer.

    ``live`` is that tensor; the slice is its elements ``[offset, offset + numel)``, or all of it where it has the
    parameter's own shape (no ZeRO). ``layout`` has the ranges of all ranks of ``process_group``.
    """

    name: str
    shape: torch.Size
    layout: Layout
    process_group: dist.ProcessGroup | None
    live: Tensor
    offset: int
    numel: int
    model_values: Callable[[], Tensor]
    """The same elements as the model itself holds them, in its own dtype."""

    def weight(self) -> Tensor:
        """The slice, on the engine's storage: writing it is the update."""
        return self._cut(self.live.data)

    def gradient(self) -> Tensor | None:
        """The averaged, unscaled and clipped gradient of the slice; there only while the engine calls ``step()``."""
        return None if self.live.grad is None else self._cut(self.live.grad)

    def _cut(self, whole: Tensor) -> Tensor:
        return whole if self.layout.is_replicated else whole.view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True, slots=True)
class Call:
    """The slices that one ``step()`` of the inner optimizer updates, by parameter name."""

    slices: dict[str, ParamSlice]

    def is_for(self, live: Tensor) -> bool:
        """Whether the engine, showing this tensor to the optimizer, means this call."""
        return any(part.live is live for part in self.slices.values())


def logical_shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape, also of a parameter that ``zero.Init`` has already replaced by a placeholder."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def wrapper_kind(engine: Any) -> str:
    """The class name of what DeepSpeed put around the optimizer; empty where it put nothing (stage 0, fp32)."""
    return "" if engine.optimizer is engine.basic_optimizer else type(engine.optimizer).__name__


def stored_place(name: str, parameter: Any, position: int) -> PlacedParameter:
    """Where the model's own values of a parameter are stored: whole, or at stage 3 a slice on each rank."""
    if not hasattr(parameter, "ds_tensor"):
        shape = parameter.shape
        return PlacedParameter(name, parameter, shape, Replicated(), None, position, parameter.requires_grad)
    process_group, numel = parameter.ds_process_group, parameter.ds_numel
    size = -(-numel // dist.get_world_size(process_group))
    layout = FlatRange.cut(numel, size, dist.get_world_size(process_group))
    own = layout.numel_on(torch.Size([numel]), own_rank(process_group))
    values = nn.Parameter(parameter.ds_tensor.data.view(-1)[:own], requires_grad=False)
    shape = torch.Size(parameter.ds_shape)
    return PlacedParameter(name, values, shape, layout, process_group, position, parameter.requires_grad)


def read_calls(engine: Any, groups: Sequence[NamedParameters]) -> list[Call]:
    """The calls of one training step, in DeepSpeed's order.

    Args:
        engine: A DeepSpeedEngine whose optimizer is configured.
        groups: Trainable parameters of each param group, as the inner optimizer was built with them.

    Raises:
        UnsupportedLayoutError: The wrapper is not one of those whose layout is known.
    """
    wrapper, kind = engine.optimizer, wrapper_kind(engine)
    if kind == "":
        return [_whole_tensors(groups, [[p for _, p in group] for group in groups])]
    if kind == "FP16_UnfusedOptimizer":
        return [_whole_tensors(groups, wrapper.fp32_groups)]
    if kind == "DeepSpeedZeroOptimizer":
        flats = zip(
            groups,
            wrapper.bit16_groups_flat,
            wrapper.single_partition_of_fp32_groups,
            wrapper.real_dp_process_group,
            strict=True,
        )
        return [Call(_cut_evenly(*flat)) for flat in flats]
    if kind == "BF16_Optimizer":
        flats = zip(
            groups,
            wrapper.bf16_groups_flat,
            wrapper.fp32_groups_flat_partition,
            wrapper.real_dp_process_group,
            strict=True,
        )
        return [Call({name: part for flat in flats for name, part in _cut_evenly(*flat).items()})]
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _cut_each(groups, wrapper)
    raise UnsupportedLayoutError(
        f"DeepSpeed wraps the optimizer in {kind}, whose layout is not known. Use ZeRO stage 0, 1, 2 or 3 without "
        "further options, or FSDP2."
    )


def with_reachable_groups(calls: Sequence[Call]) -> list[Call]:
    """The calls with process groups that communicate where the slices are. Collective where a group is made.

    Offloaded slices are in the host's memory, out of reach of NCCL: gloo moves them, between the same ranks.
    """
    return [
        Call({name: replace(part, process_group=_reaching(part)) for name, part in call.slices.items()})
        for call in calls
    ]


def _reaching(part: ParamSlice) -> dist.ProcessGroup | None:
    group = part.process_group
    if group is None or part.live.device.type in reachable_devices(group):
        return group
    return host_group(group)


def check_slices(calls: Sequence[Call], process_group: dist.ProcessGroup | None) -> None:
    """Prove what was read: all ranks' ranges tile every parameter, and each slice holds the model's own values.

    Collective. The proof costs one comparison of the weights, once.

    Raises:
        UnsupportedLayoutError: On all ranks, when the engine lays its tensors out in another way than is known.
    """
    slices = [part for call in calls for part in call.slices.values()]
    tilings = gather_objects([_range_of(part, own_rank(part.process_group)) for part in slices], process_group)
    together(lambda: _check_slices(slices, tilings), process_group)


def _check_slices(slices: Sequence[ParamSlice], tilings: Sequence[Sequence[tuple[int, int]]]) -> None:
    problem = ""
    for at, part in enumerate(slices):
        if not part.layout.is_replicated and not _tile([ranges[at] for ranges in tilings], part.shape.numel()):
            problem = f"the ranks' ranges of {part.name!r} {[ranges[at] for ranges in tilings]} do not tile it"
        elif not same(part.weight().to(part.model_values().dtype), part.model_values()):
            problem = f"the slice of {part.name!r} does not hold the model's own values"
    if problem:
        raise UnsupportedLayoutError(
            f"DeepSpeed lays out its partitions in another way than is known here: {problem}. Use deepspeed 0.19.8, "
            "and report the ZeRO options of this run."
        )


def _whole_tensors(groups: Sequence[NamedParameters], live_groups: Sequence[Sequence[Tensor]]) -> Call:
    """Stage 0: the optimizer sees the parameters themselves, or fp32 copies of the same shapes in the same order."""
    slices = {}
    for members, live_members in zip(groups, live_groups, strict=True):
        for (name, parameter), live in zip(members, live_members, strict=True):
            model_values = _reader(parameter, 0, None)
            slices[name] = ParamSlice(
                name, parameter.shape, Replicated(), None, live, 0, parameter.numel(), model_values
            )
    return Call(slices)


def _cut_evenly(
    members: NamedParameters, model_flat: Tensor, partition: Tensor, process_group: dist.ProcessGroup | None
) -> dict[str, ParamSlice]:
    """ZeRO-1/2: the group's flat buffer is cut into equal partitions, whatever lies at the cuts.

    A parameter's place is where its data lies in the buffer. DeepSpeed's own ``_hp_mapping`` says the same, except
    under round_robin_gradients, where 0.19.8 computes it for another order.
    """
    size, rank = partition.numel(), own_rank(process_group)
    world_size = model_flat.numel() // size
    slices = {}
    for name, parameter in members:
        begin = (parameter.data_ptr() - model_flat.data_ptr()) // model_flat.element_size()
        layout = FlatRange.cut(parameter.numel(), size, world_size, begin)
        start, end = layout.bounds[rank : rank + 2]
        offset = begin + start - rank * size if end > start else 0
        slices[name] = ParamSlice(
            name,
            parameter.shape,
            layout,
            process_group,
            partition,
            offset,
            end - start,
            _reader(parameter, start, end),
        )
    return slices


def _cut_each(groups: Sequence[Sequence[tuple[str, Any]]], wrapper: Any) -> list[Call]:
    """ZeRO-3: each parameter is padded and cut into equal slices, which lie one after the other in a sub-group."""
    slices: list[dict[str, ParamSlice]] = [{} for _ in wrapper.fp32_partitioned_groups_flat]
    for name, parameter in (member for group in groups for member in group):
        sub_group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
        process_group, numel = parameter.ds_process_group, parameter.ds_numel
        rank, world_size = own_rank(process_group), dist.get_world_size(process_group)
        layout = FlatRange.cut(numel, size, world_size)
        own = layout.numel_on(torch.Size([numel]), rank)
        slices[sub_group][name] = ParamSlice(
            name,
            torch.Size(parameter.ds_shape),
            layout,
            process_group,
            wrapper.fp32_partitioned_groups_flat[sub_group],
            offset,
            own,
            _reader(parameter.ds_tensor, 0, own),
        )
    return [Call(members) for members in slices if members]


def _reader(tensor: Tensor, start: int, end: int | None) -> Callable[[], Tensor]:
    """Reads these elements of the model's own tensor, flattened; all of it, in its shape, where ``end`` is None."""
    return lambda: tensor.data if end is None else tensor.data.view(-1)[start:end]


def _range_of(part: ParamSlice, rank: int) -> tuple[int, int]:
    if isinstance(part.layout, FlatRange):
        return part.layout.bounds[rank], part.layout.bounds[rank] + part.numel
    return 0, part.numel


def _tile(ranges: Sequence[tuple[int, int]], numel: int) -> bool:
    filled = [r for r in ranges if r[1] > r[0]]
    ends = [0, *(end for _, end in filled)]
    return [start for start, _ in filled] == ends[:-1] and ends[-1] == numel
