"""From a placed model to ``{fqn: PlacedParameter}``: the only reader of DTensors and of engine wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dist_optim.errors import ParameterError, UnsupportedLayoutError
from dist_optim.layouts import detect_fsdp1, detect_mesh, freezing_fsdp2
from dist_optim.layouts.layout import Layout, Replicated
from dist_optim.layouts.stack import Filters, Member, filters_of, layer_of
from dist_optim.ranks.agreement import own_rank

__all__ = [
    "PlacedParameter",
    "assert_held_by",
    "clean_name",
    "detect",
    "local_of",
    "ranks_to_meet",
    "reshard",
    "reshard_units",
    "sharded_modules",
]

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
    member: Member | Filters | None = None
    """Which matrix it is of those that ``parameter`` holds; None for a parameter as it is."""

    def matrices(self) -> list[PlacedParameter]:
        """Of a stack ``[E, m, n]`` each matrix, named as where each were a parameter in a list."""
        return [
            replace(
                self,
                fqn=f"{self.fqn}.{at}",
                shape=self.shape[1:],
                layout=layer_of(self.layout, self.shape, at),
                member=Member(self.layout, self.shape, at),
            )
            for at in range(self.shape[0])
        ]

    def filters(self) -> PlacedParameter:
        """Of a convolution's weight the matrix with a row for each filter; itself, where its parts are not rows."""
        member = filters_of(self.layout, self.shape, self.local())
        flat = torch.Size([self.shape[0], self.shape[1:].numel()])
        return self if member is None else replace(self, shape=flat, member=member)

    def whole(self) -> PlacedParameter:
        """All of the parameter, as it is in the model."""
        member = self.member
        if member is None:
            return self
        name = self.fqn.removesuffix(f".{member.number}") if member.number else self.fqn
        return replace(self, fqn=name, shape=member.shape, layout=member.stack, member=None)

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return local_of(self.parameter).device

    def local(self) -> Tensor:
        """This rank's part of the parameter, as a plain tensor on the parameter's own storage."""
        parameter: Any = self.parameter
        # The data of a DTensor is dispatched.
        local: Tensor = parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data
        return local if self.member is None else self.member.part_of(local, self._rank)

    def local_gradient(self) -> Tensor | None:
        """This rank's part of the gradient, as a plain tensor on its storage; None where there is none."""
        parameter: Any = self.parameter
        gradient: Any = parameter.grad
        if self.member is None:  # as most are, in few calls
            if gradient is None or type(gradient) is Tensor:
                return gradient
            if type(parameter) is type(gradient) is DTensor and gradient._spec is parameter._spec:
                return gradient._local_tensor
        return None if gradient is None else self.part_of(gradient)

    def part_of(self, gradient: Tensor) -> Tensor:
        """This rank's part of it: one that every rank has whole, of a sharded parameter, is cut as the parameter is.

        Such are those of embeddings under tensor parallelism.
        """
        if isinstance(gradient, DTensor) and not self._is_alike(gradient) and self._is_repeated(gradient):
            full = local_of(gradient)
            return self.layout.view_of(full if self.member is None else self.member.out_of(full), self._rank)
        return self._own(local_of(gradient))

    def _own(self, local: Tensor) -> Tensor:
        """Out of this rank's part of the parameter, its part of the matrix that this is."""
        return local if self.member is None else self.member.part_of(local, self._rank)

    @property
    def _rank(self) -> int:
        return own_rank(self.process_group)

    def takes(self, gradient: Tensor) -> bool:
        """Whether it is dense, of the parameter's dtype, and placed like it, as most are: what takes little to see."""
        parameter: Any = self.parameter
        if type(parameter) is DTensor:
            if type(gradient) is not DTensor or (
                gradient._spec is not parameter._spec and not self._is_alike(gradient)
            ):
                return False
            part, own = gradient._local_tensor, parameter._local_tensor
        else:
            if type(gradient) is not Tensor or type(self.layout) is not Replicated:
                return False
            part, own = gradient, parameter
        return part.dtype is own.dtype and part.layout is torch.strided

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

    def _is_alike(self, gradient: Tensor) -> bool:
        """Whether it is placed as the parameter is; an engine gives both the same object that says how."""
        parameter = self.parameter
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            return False
        one, other = gradient._spec, parameter._spec
        return one is other or one.placements == other.placements and one.mesh is other.mesh

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
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # to_local makes a view, a Parameter


def detect(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, *, shares_replicas: bool = True
) -> dict[str, PlacedParameter]:
    """Read the layout of every parameter of a placed and wrapped model; tied parameters appear once.

    What an engine left gathered, after an evaluation say, is resharded first: it would show other tensors, in another
    dtype, and hide what is written to the shards. Local, but for the first call on a model that is cut over several
    mesh axes: its ranks make a process group (``ranks_to_meet``).

    Args:
        model: As it will be trained: on its device, wrapped by its engine.
        process_group: The ranks that replicate plain parameters; the default group when None.
        shares_replicas: Whether the replicas of shards (HSDP) share the work, and so are ranks of one plan.

    Raises:
        UnsupportedLayoutError: A parameter is sharded in a way that cannot be served.
    """
    _refuse_unserved_wrappers(model)
    reshard(model)
    flat_places = detect_fsdp1.places_by_parameter(model, process_group, shares_replicas)
    mesh_places = detect_mesh.places_by_parameter(named_parameters(model), process_group, shares_replicas)
    placed: dict[str, PlacedParameter] = {}
    for name, parameter in named_parameters(model):
        shape, group = parameter.shape, process_group
        layout: Layout = Replicated()
        if flat := flat_places.get(id(parameter)):
            shape, layout, group = flat.shape, flat.layout, flat.process_group
        elif cut := mesh_places.get(id(parameter)):
            layout, group = cut.layout, cut.process_group
        placed[name] = PlacedParameter(name, parameter, shape, layout, group, len(placed), parameter.requires_grad)
    return placed


def ranks_to_meet(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> tuple[int, ...]:
    """The ranks for which ``detect`` makes a process group of their own; empty where it makes none. Local.

    Raises:
        UnsupportedLayoutError: As ``detect``.
    """
    reshard(model)
    return detect_mesh.reach_of(named_parameters(model), process_group)


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
    reshard_units(sharded_modules(model))


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Its modules that an engine shards, and may leave gathered."""
    return [module for module in model.modules() if isinstance(module, FSDPModule | FullyShardedDataParallel)]


def reshard_units(units: Iterable[nn.Module]) -> None:
    """``reshard`` of a model whose units are known."""
    for unit in units:
        if isinstance(unit, FSDPModule):
            freezing_fsdp2.reshard(unit)
        else:
            detect_fsdp1.reshard(unit)


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


def _refuse_unserved_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "DeepSpeedEngine":
            raise UnsupportedLayoutError(
                "The model is a DeepSpeed engine, which wraps its optimizer itself. Name the optimizer in DeepSpeed's "
                "JSON, and call dist_optim.integrations.deepspeed.register() before deepspeed.initialize."
            )
