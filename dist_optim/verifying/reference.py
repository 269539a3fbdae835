"""What one process would do: the unmodified upstream optimizer over whole tensors, without slices, owners or rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.specs.driver import ParamGroup, as_given
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["Reference"]

Tensors = Mapping[str, Tensor]


class Reference:
    """Upstream's class, built on parameters of its own; local to the process.

    Args:
        spec: Which class, and how it is constructed and stepped.
        groups: Param groups as ``building`` arranges them: ``params`` holds the ``PlacedParameter`` of the group.
        arguments: Constructor keywords.
        values: Whole tensors by name, copied; floats of any precision, which need not be the model's (fp32 masters).
    """

    def __init__(
        self, spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any], values: Tensors
    ) -> None:
        self.spec = spec
        self._arguments = arguments
        self._position = {one.fqn: one.position for group in groups for one in group["params"]}
        self.parameters = {
            one.fqn: nn.Parameter(values[one.fqn].detach().clone(), requires_grad=one.is_trained)
            for group in groups
            for one in group["params"]
        }
        self.optimizer = self._constructed(groups)
        if Trait.WEIGHT_SWAPPING in spec.traits:
            self.swap("train")

    def _constructed(self, groups: Sequence[ParamGroup]) -> Optimizer:
        given: list[ParamGroup] = []
        for group in groups:
            names = [one.fqn for one in group["params"]]
            named = {"param_names": names} if self.spec.driver.wants_names or "param_names" in group else {}
            given.append({**group, "params": [self.parameters[name] for name in names], **named})
        shown = as_given(given) if self.spec.is_undescribed else given
        return self.spec.driver.construct(self.spec.load_class(), shown, self._arguments)

    def step(self, gradients: Mapping[str, Tensor | None]) -> None:
        """One step by whole gradients, by name; those that are missing or None are none.

        Raises:
            Exception: Whatever upstream fails with.
        """
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        stepped = [one for one in self.parameters.values() if one.grad is not None]
        try:
            self._prepare()
            self.spec.driver.step(self.optimizer, list(stepped))
        finally:
            for parameter in stepped:
                parameter.grad = None

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole weights, by name."""
        return {name: one.detach().clone() for name, one in self.parameters.items()}

    def swap(self, mode: str) -> None:
        """Put the training weights in place ("train"), or the averaged ones ("eval")."""
        with contextlib.suppress(*([AttributeError] if self.spec.is_undescribed else [])):
            getattr(self.optimizer, mode)()

    def _prepare(self) -> None:
        """What a driver hands over before a step: places among the present, the norm of all gradients."""
        driver = self.spec.driver
        if driver.counts_places:
            present = [
                [one for one in group["params"] if one.grad is not None] for group in self.optimizer.param_groups
            ]
            driver.take_places(self.optimizer, [list(range(len(members))) for members in present])
        if driver.needs_total_norm(self._arguments):
            order = sorted(self.parameters, key=lambda name: self._position[name])
            gradients = [self.parameters[name].grad for name in order]
            norms = [torch.linalg.vector_norm(one.float(), 2.0) for one in gradients if one is not None]
            driver.take_total_norm(self.optimizer, torch.linalg.vector_norm(torch.stack(norms), 2.0))
