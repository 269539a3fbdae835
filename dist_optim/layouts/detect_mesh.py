"""DTensors: which part of each parameter every rank holds, over all the meshes that the parameters of a model lie on.

The ranks that share a model's work are those that any of its parameters is cut over: the **reach**. A parameter that is
cut over all of them along one mesh axis is a ``DimShard``, any other one a ``BoxShard``: cut along several axes (FSDP2
over tensor parallelism), or along some of them (a norm that every rank of tensor parallelism has).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dist_optim.errors import UnsupportedLayoutError
from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.layout import DimShard, Layout, Replicated
from dist_optim.overrides import check
from dist_optim.ranks.agreement import group_of_ranks

__all__ = ["MeshPlace", "places_by_parameter", "reach_of"]


@dataclass(frozen=True, slots=True)
class MeshPlace:
    """Layout of one DTensor, and the ranks that it is over."""

    layout: Layout
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class _Part:
    """How one parameter is cut."""

    name: str
    mesh: DeviceMesh
    shape: torch.Size
    local_shape: torch.Size
    cuts: tuple[tuple[int, int], ...]
    """Mesh axis and dim of each cut, in the order of cutting."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The mesh axes that cut it, in rising order."""
        return tuple(sorted(axis for axis, _ in self.cuts))

    @property
    def ranks(self) -> frozenset[int]:
        """Those that it is cut over, as this rank sees them."""
        return _ranks(_slice_of(self.mesh.mesh, set(self.axes)))


def reach_of(
    parameters: Iterable[tuple[str, nn.Parameter]], process_group: dist.ProcessGroup | None
) -> tuple[int, ...]:
    """The ranks that share the work of these parameters, where they need a process group of their own. Local.

    Raises:
        UnsupportedLayoutError: A parameter is placed in a way that cannot be served.
    """
    parts = list(_parts(parameters))
    reach, is_plain = _reach(parts, process_group)
    return () if is_plain or _is_group(reach, process_group) else reach


def places_by_parameter(
    parameters: Iterable[tuple[str, nn.Parameter]],
    process_group: dist.ProcessGroup | None,
    shares_replicas: bool = True,
) -> Mapping[int, MeshPlace]:
    """``id(parameter)`` to its place, for every DTensor.

    Where parameters are cut over several axes, the first call makes a process group, and is a collective of its ranks.

    Args:
        parameters: By name.
        process_group: The ranks that train the model.
        shares_replicas: Whether the replicas of shards (HSDP) share the work.

    Raises:
        UnsupportedLayoutError: A parameter is placed in a way that cannot be served.
    """
    named = [(name, parameter) for name, parameter in parameters if isinstance(parameter, DTensor)]
    if not named:
        return {}
    parts = {part.name: part for part in _parts(named)}
    reach, is_plain = _reach(list(parts.values()), process_group, shares_replicas)
    group = None if is_plain else _group_of(reach, process_group)
    tables = _Tables(list(parts.values()), reach)
    places = {}
    for name, parameter in named:
        part, mesh = parts.get(name), parameter.device_mesh
        if part is None:
            places[id(parameter)] = MeshPlace(Replicated(), mesh.get_group(0) if mesh.ndim == 1 else None)
        elif is_plain:
            ((axis, dim),) = part.cuts
            places[id(parameter)] = MeshPlace(DimShard(dim, mesh.size(axis)), mesh.get_group(axis))
        else:
            places[id(parameter)] = MeshPlace(tables.layout_of(part), group)
    return places


def _group_of(reach: tuple[int, ...], process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return process_group if _is_group(reach, process_group) else group_of_ranks(reach)


def _is_group(reach: tuple[int, ...], process_group: dist.ProcessGroup | None) -> bool:
    return list(reach) == dist.get_process_group_ranks(process_group or dist.group.WORLD)


# Cuts ---------------------------------------------------------------------------------------------------------------


def _parts(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[_Part]:
    """Of the DTensors that are cut, how."""
    for name, parameter in parameters:
        if isinstance(parameter, DTensor):
            cuts = _cuts(name, parameter)
            if cuts:
                with torch.no_grad():
                    held = parameter.to_local().shape
                yield _Part(name, parameter.device_mesh, parameter.shape, held, cuts)


def _cuts(name: str, parameter: DTensor) -> tuple[tuple[int, int], ...]:
    """The cutting axes in the order in which they cut.

    Axes cut from the first to the last, but for one that was added over others (FSDP2 over tensor parallelism): it
    says that so many chunks of its dim were there before, cut by axes behind it.
    """
    check("FSDP2")
    mesh, placements = parameter.device_mesh, parameter.placements
    cuts: list[tuple[int, int]] = []
    for axis, placement in reversed(list(enumerate(placements))):
        if type(placement) is Replicate:
            continue
        if not placement.is_shard() and not hasattr(placement, "split_factor"):
            raise UnsupportedLayoutError(_why_not_cut(name, placement))
        dim = getattr(placement, "dim")  # noqa: B009 - of kinds of placement that torch does not export
        of_dim = [cut for cut in cuts if cut[1] == dim]
        before = _num_before(of_dim, mesh, int(getattr(placement, "split_factor", 1)))
        if before is None:
            raise UnsupportedLayoutError(
                f"{name!r} has the placements {placements} on a mesh of {tuple(mesh.shape)}: a part is several blocks "
                "of rows. What is cut in one block is served: apply parallelize_module first, and fully_shard over it."
            )
        cuts = [*of_dim[:before], (axis, dim), *of_dim[before:], *(cut for cut in cuts if cut[1] != dim)]
    return tuple([cut for cut in cuts if mesh.size(cut[0]) > 1] or cuts[:1])


def _num_before(cuts: Sequence[tuple[int, int]], mesh: DeviceMesh, chunks: int) -> int | None:
    """How many of the first cuts make so many chunks; None where no number of them does."""
    made = list(itertools.accumulate((mesh.size(axis) for axis, _ in cuts), initial=1, func=lambda a, b: a * b))
    return made.index(chunks) if chunks in made else None


def _why_not_cut(name: str, placement: object) -> str:
    if "Partial" in type(placement).__name__:
        return (
            f"{name!r} has the placement {placement!r}: each rank holds one term of a sum, and none the parameter. "
            "Before building, on all ranks: redistribute it to Replicate() or Shard(dim)."
        )
    return f"{name!r} has the placement {placement!r}. Shard(dim) and Replicate() are served. Reshard the parameter."


# Ranks --------------------------------------------------------------------------------------------------------------


def _reach(
    parts: Sequence[_Part], process_group: dist.ProcessGroup | None, shares_replicas: bool = True
) -> tuple[tuple[int, ...], bool]:
    """The ranks that share the work, in order, and whether every parameter is cut over all of them along one axis."""
    if not parts:
        return (), True
    for part in parts:
        if part.mesh.get_coordinate() is None:
            raise UnsupportedLayoutError(
                f"{part.name!r} lies on the ranks {part.mesh.mesh.flatten().tolist()}, and this one is not among them. "
                "Build an optimizer on the ranks that hold the model alone: process_group=."
            )
        _check_order(part)
    kinds = list({(part.mesh, part.axes): part for part in parts}.values())
    everybody = frozenset(dist.get_process_group_ranks(process_group or dist.group.WORLD))
    # The replicas of HSDP share the work too, as far as the caller lets them.
    reaches = {
        one if shares_replicas and (one := _ranks(part.mesh.mesh)) <= everybody else part.ranks for part in kinds
    }
    if len(reaches) == 1 and all(len(part.cuts) == 1 and part.ranks in reaches for part in kinds):
        return tuple(sorted(next(iter(reaches)))), True
    wanted = frozenset[int]().union(*reaches)
    return tuple(sorted(_smallest_slice(wanted, _frames(kinds), process_group))), False


def _check_order(part: _Part) -> None:
    """Each cutting axis counts its ranks as its process group does.

    Else torch itself has two minds: it deals parts out by the group, and redistributes them by the axis.
    """
    for axis in part.axes:
        along = _slice_of(part.mesh.mesh, {axis}).tolist()
        if along != (grouped := dist.get_process_group_ranks(part.mesh.get_group(axis))):
            raise UnsupportedLayoutError(
                f"{part.name!r} is cut along a mesh axis of the ranks {along}, whose process group has them as "
                f"{grouped}: which rank holds which part is not defined. Make the mesh with init_device_mesh, or "
                "from ranks in rising order."
            )


def _smallest_slice(
    wanted: frozenset[int], frames: Sequence[Tensor], process_group: dist.ProcessGroup | None
) -> frozenset[int]:
    """The fewest ranks that hold the wanted ones and have the same shape seen from each of them."""
    found = [_ranks_along(frame, _axes_along(frame, wanted)) for frame in frames if wanted <= _ranks(frame)]
    everybody = frozenset(dist.get_process_group_ranks(process_group or dist.group.WORLD))
    return min([*found, everybody], key=len)


def _frames(parts: Iterable[_Part]) -> list[Tensor]:
    """The meshes that parameters lie on, and those that they were taken from, as arrays of ranks; each once."""
    frames: list[Tensor] = []
    for mesh in {id(part.mesh): part.mesh for part in parts}.values():
        for one in (mesh, _root_of(mesh)):
            if not any(torch.equal(one.mesh, known) for known in frames):
                frames.append(one.mesh)
    return frames


def _root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that it was taken from; itself, where it is a whole one."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    resources: Any = device_mesh._mesh_resources  # until torch 2.9
    root: DeviceMesh = resources.get_root_mesh(mesh)
    return root


class _Tables:
    """Which chunk of each cut every rank of the reach holds; worked out once for parameters that are cut alike."""

    def __init__(self, parts: Sequence[_Part], reach: tuple[int, ...]) -> None:
        self._frames = _frames(parts)
        self._reach = reach
        self._made: dict[tuple[DeviceMesh, tuple[tuple[int, int], ...]], BoxShard] = {}

    def layout_of(self, part: _Part) -> BoxShard:
        key = part.mesh, part.cuts
        if key not in self._made:
            at = self._coordinates(part)
            cuts = tuple((dim, part.mesh.size(axis)) for axis, dim in part.cuts)
            chunks = tuple(tuple(at[rank][axis] for axis, _ in part.cuts) for rank in self._reach)
            self._made[key] = BoxShard(cuts, chunks)
        layout = self._made[key]
        _check_shape(part, layout, self._reach.index(dist.get_rank()))
        return layout

    def _coordinates(self, part: _Part) -> Mapping[int, tuple[int, ...]]:
        """Where each rank of the reach is on the parameter's mesh, or on the one like it that the rank is on."""
        own = _coordinates_in(part.mesh.mesh)
        if own.keys() >= set(self._reach):
            return own
        for frame in self._frames:
            if not set(self._reach) <= _ranks(frame) or not own.keys() <= _ranks(frame):
                continue
            axes = _axes_along(frame, own.keys())
            if _ranks_along(frame, axes) == own.keys():
                return {rank: own[_twin(frame, axes, rank)] for rank in self._reach}
        raise UnsupportedLayoutError(
            f"{part.name!r} is cut over the ranks {sorted(own)}, and other parameters over more of {self._reach}, "
            "along meshes that do not fit into one. Make one mesh with init_device_mesh, and shard along its axes."
        )


def _check_shape(part: _Part, layout: BoxShard, rank: int) -> None:
    """What this rank holds has the shape of its box: where all do, so does every value lie where it is expected."""
    there = layout.view_of(torch.empty(part.shape, device="meta"), rank).shape
    if there != part.local_shape and not there.numel() == part.local_shape.numel() == 0:
        raise UnsupportedLayoutError(
            f"{part.name!r}: this rank holds {tuple(part.local_shape)} of {tuple(part.shape)}, and a box of "
            f"{tuple(there)} was expected: a dim that does not divide evenly is cut in several blocks. Choose sizes "
            "that the mesh divides, or apply parallelize_module first, and fully_shard over it."
        )


def _twin(frame: Tensor, axes: set[int], rank: int) -> int:
    """The rank along these axes of this one that stands where the given one does."""
    there, here = _coordinates_in(frame)[rank], _coordinates_in(frame)[dist.get_rank()]
    at = tuple(there[axis] if axis in axes else here[axis] for axis in range(frame.ndim))
    return int(frame[at])


def _coordinates_in(ranks: Tensor) -> dict[int, tuple[int, ...]]:
    places = itertools.product(*map(range, ranks.shape))
    return dict(zip(ranks.flatten().tolist(), places, strict=True))


def _ranks(frame: Tensor) -> frozenset[int]:
    return frozenset(frame.flatten().tolist())


def _axes_along(frame: Tensor, ranks: Iterable[int]) -> set[int]:
    """The axes along which some of these ranks differ from others."""
    places = [place for rank, place in _coordinates_in(frame).items() if rank in set(ranks)]
    return {axis for axis in range(frame.ndim) if len({place[axis] for place in places}) > 1}


def _ranks_along(frame: Tensor, axes: set[int]) -> frozenset[int]:
    return _ranks(_slice_of(frame, axes))


def _slice_of(frame: Tensor, axes: set[int]) -> Tensor:
    """The ranks that this one reaches along these axes, in an array of so many dims."""
    here = _coordinates_in(frame)[dist.get_rank()]
    return frame[tuple(slice(None) if axis in axes else here[axis] for axis in range(frame.ndim))]
