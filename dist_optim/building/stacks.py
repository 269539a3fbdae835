"""What is matrices to an algorithm of matrices: each of a stack of experts; the filters of a convolution."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from dist_optim.errors import ParameterError
from dist_optim.layouts.detect import PlacedParameter, named_modules
from dist_optim.specs.composed import OPTIM, ComposedSpec
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = [
    "convolutions_of",
    "coverage",
    "coverage_line",
    "in_matrices",
    "refuse_low_coverage",
    "stacks_of",
    "takes_matrices",
]

FEW = 0.5
"""Under this share the audit warns."""

MARK = "expert"
"""In the name of the module that owns a stack, or of its class."""


def stacks_of(model: nn.Module, placed: Mapping[str, PlacedParameter]) -> set[str]:
    """Names of the 3-D parameters (logical shapes) of modules that are experts by their name, or their class's.

    transformers 5 keeps the experts of a layer so (``mlp.experts.gate_up_proj``), outside of ``nn.Linear``.
    """
    kinds = {name: type(module).__name__ for name, module in named_modules(model)}
    owners = {name: name.rpartition(".")[0] for name, one in placed.items() if len(one.shape) == 3}
    return {name for name, owner in owners.items() if MARK in f"{owner} {kinds.get(owner, '')}".lower()}


def convolutions_of(model: nn.Module) -> set[str]:
    """Names of the weights of ``nn.Conv1d``, ``2d`` and ``3d``."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{name}.weight" if name else "weight" for name, one in named_modules(model) if isinstance(one, kinds)}


def takes_matrices(spec: OptimizerSpec, group: ParamGroup) -> bool:
    """Whether a group is stepped by an algorithm of matrices."""
    own = spec.parts[group[OPTIM]] if isinstance(spec, ComposedSpec) else spec
    return Trait.HIDDEN_MATRICES in own.traits or (Trait.LOW_RANK in own.traits and "rank" in group)


def in_matrices(
    spec: OptimizerSpec, groups: list[ParamGroup], stacks: Collection[str], convolutions: Collection[str]
) -> list[ParamGroup]:
    """The groups with each of these stacks as its matrices, where an algorithm of matrices steps it.

    To Muon the filters of a convolution are one matrix, as its authors have it; the papers of low-rank projections have
    no such thing.
    """

    def members(group: ParamGroup, one: PlacedParameter) -> list[PlacedParameter]:
        if one.fqn in convolutions and "rank" not in group:
            return [one.filters()]
        return one.matrices() if one.fqn in stacks else [one]

    return [
        {**group, "params": [part for one in group["params"] for part in members(group, one)]}
        if takes_matrices(spec, group)
        else group
        for group in groups
    ]


def coverage(named: OptimizerSpec, spec: OptimizerSpec, groups: list[ParamGroup]) -> float | None:
    """The share of the trained elements that an algorithm of matrices steps, where one was named; else None."""
    if not {Trait.HIDDEN_MATRICES, Trait.LOW_RANK} & named.traits:
        return None
    numels = [sum(one.shape.numel() for one in group["params"] if one.is_trained) for group in groups]
    own = [number for number, group in zip(numels, groups, strict=True) if takes_matrices(spec, group)]
    return sum(own) / (sum(numels) or 1)


def coverage_line(name: str, share: float | None, left: Collection[str] = ()) -> str | None:
    """What the audit says of it, and of the stacks that are left whole."""
    if share is None:
        return None
    line = f"{name} as matrices: {share:.1%} of the trained elements"
    if left:
        line += f"; inside backward the stacks of experts are none ({len(left)} tensors)"
    return line if share >= FEW else f"careful: {line}; embeddings and what target_modules leaves out are the rest"


def refuse_low_coverage(name: str, share: float | None, least: float | None) -> None:
    """Refuse a share below the user's bound.

    Raises:
        ParameterError: With what to do.
    """
    if least is None:
        return
    if share is None:
        raise ParameterError(f"min_coverage={least}: {name} steps every tensor alike. Leave min_coverage out.")
    if share < least:
        raise ParameterError(
            f"{name} takes {share:.1%} of the trained elements as matrices, and min_coverage asks for {least:.1%}. "
            "Select more layers (target_modules, params), or lower min_coverage."
        )
