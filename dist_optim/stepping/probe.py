"""The start-up probe: is an optimizer that nobody described separable per tensor?

Owners step their tensors apart from each other. That is upstream's own trajectory only if the update of one tensor does
not depend on the others. The probe runs the class on a few tiny tensors, together and apart, and compares the bits.
It never concludes that an optimizer is elementwise: thresholds on sizes and norms would hide from tiny tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.errors import DistOptimError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Replicated
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.verdict import Ghosts, Verdict
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["prove_separable"]

NUM_STEPS = 4
SIDES = (6, 5, 4, 3)
PER_KIND = 2
"""Tensors of each number of dimensions that are taken from a param group."""


class GhostsWithGradients(UpstreamDriver):
    """For optimizers that are separable only where ghosts carry an (empty) gradient."""

    ghosts_have_gradients = True


def prove_separable(spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> OptimizerSpec:
    """Return the spec with the kind of ghosts under which tensors can be stepped apart.

    Local to the process and deterministic. The global random state is left as it was.

    Args:
        spec: An optimizer without a description.
        groups: The param groups that it will get; ``params`` are placed parameters.
        arguments: Its constructor's keywords.

    Raises:
        UnsupportedError: It cannot be stepped at all without a closure, or a tensor's update depends on other tensors.
    """
    tiny = _tiny_groups(groups)
    numel = sum(len(group["params"]) for group in tiny)
    devices = [placed.device for group in tiny for placed in group["params"] if placed.device.type == "cuda"]
    with torch.random.fork_rng(devices=list({device.index or 0 for device in devices})):
        try:
            together = _run(spec, tiny, arguments, list(range(numel)))
        except DistOptimError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{spec.name} cannot be tried out: stepping tiny tensors fails with {type(error).__name__}: {error}. "
                "An optimizer whose step() needs a closure, or more than gradients, cannot be distributed. Otherwise "
                "register an OptimizerSpec that describes it."
            ) from error
        for driver in (spec.driver, GhostsWithGradients()):
            candidate = replace(spec, driver=driver)
            if _equal_apart(candidate, tiny, arguments, together):
                return candidate
    raise UnsupportedError(
        f"{spec.name} is not separable per tensor: stepped together, tensors move otherwise than stepped apart (a norm "
        "or a step size over all tensors, or draws from the global random generator). Its state cannot be divided over "
        "ranks with an equal trajectory. Use it in one process, or another optimizer."
    )


def _equal_apart(
    spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any], together: Mapping[int, Tensor]
) -> bool:
    try:
        return all(torch.equal(_run(spec, groups, arguments, [index])[index], together[index]) for index in together)
    except Exception:  # upstream fails on this kind of ghost: then it is the wrong kind
        return False


def _run(
    spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any], stepped: Sequence[int]
) -> dict[int, Tensor]:
    """The stepped tensors after a few steps with growing gradients; one tensor lacks a gradient once."""
    placed = [member for group in groups for member in group["params"]]
    instance = UpstreamInstance(spec, groups, {index: placed[index].shape for index in stepped}, arguments)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    values = {index: member.local().clone() for index, member in enumerate(placed)}
    for step in range(NUM_STEPS):
        drawn = [torch.randn(member.shape, generator=generator) * 3.0**step for member in placed]
        present = [not (step == 2 and index == 0 and len(placed) > 1) for index in range(len(placed))]
        gradients = {
            index: drawn[index].to(placed[index].device, placed[index].dtype) for index in stepped if present[index]
        }
        updated = instance.step({index: values[index] for index in gradients}, gradients, present)
        values.update({index: tensor.clone() for index, tensor in updated.items()})
    return {index: values[index] for index in stepped}


def _tiny_groups(groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """The same groups, with a few tiny tensors of each number of dimensions in place of the real ones."""
    generator = torch.Generator().manual_seed(1)
    tiny: list[ParamGroup] = []
    for group in groups:
        taken: dict[int, list[PlacedParameter]] = {}
        for placed in group["params"]:
            alike = taken.setdefault(len(placed.shape), [])
            if len(alike) < PER_KIND and placed.is_trained:
                alike.append(placed)
        members = [_tiny(placed, generator) for alike in taken.values() for placed in alike]
        tiny.append({**group, "params": members})
    return [group for group in tiny if group["params"]]


def _tiny(placed: PlacedParameter, generator: torch.Generator) -> PlacedParameter:
    shape = torch.Size(min(side, SIDES[at % len(SIDES)]) for at, side in enumerate(placed.shape))
    value = torch.randn(shape, generator=generator).to(placed.device, placed.dtype)
    return PlacedParameter(placed.fqn, nn.Parameter(value), shape, Replicated(), None)


def prove(spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> Verdict:
    try:
        proven = prove_separable(spec, groups, arguments)
    except UnsupportedError as error:
        return Verdict(name=spec.name, is_independent=False, reason=str(error)[:90])
    ghosts: Ghosts = "with gradients" if proven.driver.ghosts_have_gradients else "empty"
    return Verdict(name=spec.name, is_independent=True, reason="tried apart", ghosts=ghosts, evaluations=1)
