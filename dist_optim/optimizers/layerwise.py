"""Layerwise GaLore and APOLLO: transformers' names for one optimizer a parameter, stepped inside backward."""

from __future__ import annotations

from dataclasses import replace

from dist_optim.optimizers import apollo, galore
from dist_optim.registry import OptimizerSpec, Trait

__all__ = ["SPECS"]


def _layerwise(spec: OptimizerSpec) -> OptimizerSpec:
    return replace(
        spec,
        name=f"{spec.name}_layerwise",
        traits=spec.traits | {Trait.FUSED_BACKWARD},
        summary=f"{spec.summary}; stepped inside backward, one parameter at a time",
        refusal=(
            "it steps each parameter inside backward, before gradients are reduced over ranks or clipped, and its "
            "state cannot be saved. Stepping inside backward is not served. Use "
            f"{spec.name}, the same algorithm with stored gradients."
        ),
    )


SPECS = tuple(_layerwise(spec) for spec in (*galore.SPECS, *apollo.SPECS) if spec.name != "apollo_mini")
