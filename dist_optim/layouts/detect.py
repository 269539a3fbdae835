"""From a placed model to ``{fqn: PlacedParameter}``: the only reader of DTensors and of engine wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_optim.errors import ParameterError, UnsupportedLayoutError
from dist_optim.layouts.detect_fsdp1 import places_by_parameter
from dist_optim.layouts.detect_fsdp1 import reshard as reshard_fsdp1
from dist_optim.layouts.freezing_fsdp2 import keep_freezing
from dist_optim.layouts.layout import DimShard, Layout, Replicated
from dist_optim.overrides import check
from dist_optim.ranks.agreement import own_rank

__all__ = ["PlacedParameter", "assert_held_by", "clean_name", "detect", "has_shards", "local_of", "reshard"]

# Modules that engines and transforms put around the user's own; they add a name part that the logical name lacks.
_WRAPPER_ATTRIBUTES = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True, slots=True, eq=False)
class PlacedParameter:
    """One logical parameter and where it is stored.

    ``fqn`` is the name in the user's own model, without wrappers; ``shape`` is the logical, unsharded one.
    """

    fqn: str
    parameter: nn.Parameter
    shape: torch.Size
    layout: Layout
    process_group: dist.ProcessGroup | None
    position: int = 0
    """Place in ``model.parameters()``."""
    is_trained: bool = True
    """Whether an optimizer steps it when it has a gradient. Fixed when it is built, whatever is frozen later."""
    is_idle: bool = False
    """Frozen when the optimizer was built, and named in a group: it is stepped from its first gradient on."""

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return local_of(self.parameter).device

    def local(self) -> Tensor:
        """This rank's part of the parameter, as a plain tensor on the parameter's own storage."""
        parameter = self.parameter
        return local_of(parameter) if isinstance(parameter, DTensor) else parameter.data  # of a DTensor that dispatches

    def local_gradient(self) -> Tensor | None:
        """This rank's part of the gradient, as a plain tensor on its storage; None where there is none."""
        gradient = self.parameter.grad
        return gradient if gradient is None or type(gradient) is Tensor else self.part_of(gradient)

    def part_of(self, gradient: Tensor) -> Tensor:
        """This rank's part of it: one that every rank has whole, of a sharded parameter, is cut as the parameter is.

        Such are those of embeddings under tensor parallelism.
        """
        if isinstance(gradient, DTensor) and self._is_repeated(gradient):
            return self.layout.view_of(local_of(gradient), own_rank(self.process_group))
        return local_of(gradient)

    def why_misplaced(self, gradient: Tensor) -> str:
        """Why no part of this gradient can be stepped by as it lies, and what to do; empty where one can."""
        parameter = self.parameter
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor) or self._is_repeated(gradient):
            return ""
        if gradient.placements == parameter.placements and gradient.device_mesh == parameter.device_mesh:
            return ""
        is_partial = any(placement.is_partial() for placement in gradient.placements)
        what = ": each rank holds one term of the sum" if is_partial else ""
        return (
            f"is placed {gradient.placements}, and the parameter {parameter.placements}{what}. Before step(), on all "
            "ranks: parameter.grad = parameter.grad.redistribute(parameter.device_mesh, parameter.placements)."
        )

    def _is_repeated(self, gradient: DTensor) -> bool:
        parameter = self.parameter
        return (
            isinstance(parameter, DTensor)
            and gradient.placements != parameter.placements
            and gradient.device_mesh == parameter.device_mesh
            and all(placement.is_replicate() for placement in gradient.placements)
        )


def local_of(tensor: Tensor) -> Tensor:
    """The plain local tensor of a DTensor, on the same storage; any other tensor is returned as it is."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def detect(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> dict[str, PlacedParameter]:
    """Read the layout of every parameter of a placed and wrapped model; tied parameters appear once.

    What an engine left gathered, after an evaluation say, is resharded first: it would show other tensors, in another
    dtype, and hide what is written to the shards.

    Args:
        model: As it will be trained: on its device, wrapped by its engine.
        process_group: The ranks that replicate plain parameters; the default group when None.

    Raises:
        UnsupportedLayoutError: A parameter is sharded in a way that cannot be served.
    """
    _refuse_unserved_wrappers(model)
    reshard(model)
    flat_places = places_by_parameter(model)
    placed: dict[str, PlacedParameter] = {}
    for name, parameter in named_parameters(model):
        shape, group = parameter.shape, process_group
        layout: Layout = Replicated()
        if id(parameter) in flat_places:
            place = flat_places[id(parameter)]
            shape, layout, group = place.shape, place.layout, place.process_group
        elif isinstance(parameter, DTensor):
            layout, group = _layout_of_dtensor(name, parameter)
        placed[name] = PlacedParameter(name, parameter, shape, layout, group, len(placed), parameter.requires_grad)
    return placed


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters, each once, under their logical names."""
    for name, parameter in model.named_parameters():
        yield clean_name(model, name), parameter


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules under their logical names; wrappers themselves are left out."""
    for name, module in model.named_modules():
        if not _is_wrapper(module):
            yield clean_name(model, name), module


def reshard(model: nn.Module) -> None:
    """Free the full copies of sharded parameters that an engine may have left gathered after a forward pass.

    They would outlive a change of the shards: the next forward pass would not see it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            keep_freezing(module)
            module.reshard()
    reshard_fsdp1(model)


def has_shards(model: nn.Module) -> bool:
    """Whether an engine shards any of its modules, so that it may leave them gathered."""
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


def assert_held_by(model: nn.Module, placed: Iterable[PlacedParameter]) -> None:
    """Refuse to take one model for another: these parameters are the model's, whatever wraps it. Local.

    Raises:
        ParameterError: With the first one that is not.
    """
    reshard(model)
    held = {id(parameter) for parameter in model.parameters()}
    for one in placed:
        if id(one.parameter) not in held:
            raise ParameterError(
                f"{one.fqn!r} of the optimizer is not a parameter of this {type(model).__name__}: it was built on "
                "another model. Save and load each model with its own optimizer; weights alone, by torch.save."
            )


def clean_name(model: nn.Module, name: str) -> str:
    """Drop the parts of a dotted name that wrappers added (``module.`` of DDP, ``_orig_mod.`` of torch.compile)."""
    kept, at = [], model
    for part in name.split(".") if name else []:
        if not (part in _WRAPPER_ATTRIBUTES and _is_wrapper(at)):
            kept.append(part)
        at = getattr(at, part)
    return ".".join(kept)


def _is_wrapper(module: nn.Module) -> bool:
    """A module of an engine or transform, which has the user's module as its child under a known attribute."""
    package = type(module).__module__.split(".")[0]
    return package in ("torch", "deepspeed", "accelerate") and any(
        attribute in getattr(module, "_modules", {}) for attribute in _WRAPPER_ATTRIBUTES
    )


def _layout_of_dtensor(name: str, parameter: DTensor) -> tuple[Layout, dist.ProcessGroup | None]:
    """The layout over the one axis that shards; along all others the parameter is repeated (HSDP's replicas)."""
    check("FSDP2")
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [axis for axis, placement in enumerate(placements) if type(placement) is not Replicate]
    if not sharded:
        return Replicated(), mesh.get_group(0) if mesh.ndim == 1 else None
    if len(sharded) > 1:
        raise UnsupportedLayoutError(
            f"{name!r} is sharded over {len(sharded)} mesh axes: mesh {tuple(mesh.shape)}, placements {placements}. An "
            "owner gathers over one axis only. Shard over one axis (fully_shard on a 1-D mesh, or on a 2-D mesh whose "
            "first axis replicates), without tensor parallelism."
        )
    (axis,) = sharded
    placement = placements[axis]
    if type(placement) is not Shard:
        raise UnsupportedLayoutError(
            f"{name!r} has the placement {placement!r}. Shard(dim) and Replicate() are served. Reshard the parameter."
        )
    return DimShard(placement.dim, mesh.size(axis)), mesh.get_group(axis)


def _refuse_unserved_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "DeepSpeedEngine":
            raise UnsupportedLayoutError(
                "The model is a DeepSpeed engine, which wraps its optimizer itself. Name the optimizer in DeepSpeed's "
                "JSON, and call dist_optim.integrations.deepspeed.register() before deepspeed.initialize."
            )
