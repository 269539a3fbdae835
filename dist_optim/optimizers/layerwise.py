"""Layerwise GaLore and APOLLO: transformers' names for updates inside backward, one parameter at a time.

They are the plain algorithms, and end where those end. transformers builds an optimizer for each parameter: the
schedule, weight decay and saved state are lost there, and every APOLLO parameter gets the same seed. Here one
optimizer is stepped by ``dist_optim.inside_backward.handle``.
"""

from __future__ import annotations

from dataclasses import replace

from dist_optim.optimizers import apollo, galore
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["SPECS"]


def _layerwise(spec: OptimizerSpec) -> OptimizerSpec:
    return replace(
        spec,
        name=f"{spec.name}_layerwise",
        traits=spec.traits | {Trait.FUSED_BACKWARD},
        summary=f"{spec.summary}; stepped inside backward, one parameter at a time",
        instead=spec.name,
    )


SPECS = tuple(_layerwise(spec) for spec in (*galore.SPECS, *apollo.SPECS) if spec.name != "apollo_mini")
