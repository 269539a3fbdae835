"""One of the two sides: one process, with upstream's own class. The other one is ``sides``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_optim.building.build import build_optimizer
from dist_optim.building.choice import resolve
from dist_optim.building.composing import Rest, compose
from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec, get_spec
from dist_optim.stepping.division import is_half
from dist_optim.testing.verify.job import Job, make_model
from dist_optim.verifying.reference import Reference

__all__ = ["one_process"]

BUILD_ALONE = {*inspect.signature(build_optimizer).parameters} - {"rest", "rest_options", "target_modules", "no_decay"}
"""Options of the build that one process has nothing of: how gradients travel, who looks at what."""


def one_process(job: Job) -> Reference:
    """Upstream's class on the whole model. Local."""
    spec = resolve(job.optimizer, inside_backward=True)
    is_inside = bool(spec.instead or job.options.get("fused_backward"))
    if spec.instead:
        spec = get_spec(spec.instead)
    model = make_model(job)
    options = {key: value for key, value in job.options.items() if key not in BUILD_ALONE}
    rest = Rest(options.pop("rest", None), options.pop("rest_options", None) or {})
    spec, groups, arguments = compose(
        model,
        spec,
        detect(model),
        {key: value for key, value in options.items() if key not in ("target_modules", "no_decay")},
        target_modules=options.get("target_modules"),
        no_decay=options.get("no_decay", ()),
        rest=rest,
        splits_stacks=not is_inside,
    )
    values: dict[str, Tensor] = dict(model.named_parameters())
    if job.options.get("master_weights"):
        values = {name: one.float() if is_half(one.dtype) else one for name, one in values.items()}
    return _ByModel(spec, groups, arguments, values)


class _ByModel(Reference):
    """By the names of the model: what is several parameters to upstream is cut, and put together again."""

    def __init__(
        self, spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any], values: dict[str, Tensor]
    ) -> None:
        self._placed: list[PlacedParameter] = [one for group in groups for one in group["params"]]
        super().__init__(spec, groups, arguments, self._cut(values))

    def _cut(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {one.fqn: values.get(one.whole().fqn) for one in self._placed}
        return {
            one.fqn: full if one.member is None else one.member.out_of(full)
            for one in self._placed
            if (full := whole[one.fqn]) is not None
        }

    def step(self, gradients: Mapping[str, Tensor | None]) -> None:
        super().step(self._cut({name: one for name, one in gradients.items() if one is not None}))

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for one in self._placed:
            own, whole = self.parameters[one.fqn].detach(), one.whole()
            full = found.setdefault(whole.fqn, torch.empty(whole.shape, dtype=own.dtype, device=own.device))
            (full if one.member is None else one.member.out_of(full)).copy_(own)
        return found
