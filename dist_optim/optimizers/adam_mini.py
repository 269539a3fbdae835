"""Adam-mini: AdamW with one second moment for a whole block of a tensor, and blocks that go by parameters' names.

Upstream is built from a model, and makes a param group of each parameter. Here the same: every parameter has a group of
its own, which holds its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_optim.optimizers.common import betas, epsilon, learning_rate, weight_decay
from dist_optim.optimizers.pytorch_optimizer import EXTRA, FOREACH, LICENCE, MAXIMIZE, PACKAGE, whole_number
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

NAME = "name"
HEADS = ("k_proj.weight", "q_proj.weight", "wq.weight", "wk.weight")
"""Parts of names whose tensors upstream cuts into heads."""


class _Named:
    """What upstream reads of a model."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self._named = named

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named


class AdamMiniDriver(UpstreamDriver):
    """Hands upstream the names, and its own groups what the user set in them."""

    def values_by_parameter(self, model: nn.Module, names: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        # The last first: each is split off behind what is left of its group, so that they end in the model's order.
        return {parameter_id: {NAME: name} for parameter_id, name in reversed(list(names.items()))}

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        named = [(group[NAME], parameter) for group in param_groups for parameter in group["params"]]
        own = {key: value for key, value in arguments.items() if key != NAME}
        build: Any = optimizer_class
        optimizer: Optimizer = build(_Named(named), **own)
        made = {id(group["params"][0]): group for group in optimizer.param_groups}
        optimizer.param_groups = [self._filled(group, made, optimizer.defaults) for group in param_groups]
        return optimizer

    def _filled(self, group: ParamGroup, made: Mapping[int, ParamGroup], defaults: Mapping[str, Any]) -> ParamGroup:
        """Upstream's group with the values that are set; an empty one for what is frozen, which upstream leaves out."""
        upstream = made.get(id(group["params"][0])) if group["params"] else None
        row = {**defaults, "weight_decay": 0.0, "params": []} if upstream is None else upstream
        row.update({key: value for key, value in group.items() if key != "params"})
        return row

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        if not any(part in values.get(NAME, "") for part in HEADS):
            return ""
        head = values["num_embeds"] ** 2 // values["num_heads"]
        if shape.numel() % head == 0:
            return ""
        return (
            f"upstream cuts it into heads of num_embeds * num_embeds / num_heads = {head} elements, which do not "
            f"divide its {shape.numel()}. Pass the model's own num_embeds and num_heads."
        )


SPECS = (
    OptimizerSpec(
        name="adam_mini",
        load=UpstreamClass("pytorch_optimizer", "AdamMini"),
        package=PACKAGE,
        extra=EXTRA,
        traits=frozenset({Trait.WHOLE_TENSOR}),
        hyperparameters=(
            learning_rate(1.0),
            betas(),
            weight_decay(0.1, meaning="decoupled weight decay; norms have none where their group sets none"),
            whole_number("num_embeds", 2048, "the model's hidden size", 1, Scope.CONSTRUCTOR),
            whole_number("num_heads", 32, "the model's attention heads", 1, Scope.CONSTRUCTOR),
            Hyperparameter(
                name="num_query_groups",
                kind="int",
                default=None,
                minimum=1,
                optional=True,
                scope=Scope.CONSTRUCTOR,
                meaning="groups of heads that share keys and values; None for one a head",
            ),
            epsilon(),
            MAXIMIZE,
            Hyperparameter(
                name="foreach",
                kind="bool",
                default=None,
                optional=True,
                scope=Scope.CONSTRUCTOR,
                meaning=FOREACH.meaning,
            ),
            Hyperparameter(
                name=NAME, kind="str", default="", meaning="the parameter's name; set for you, group by group"
            ),
        ),
        driver=AdamMiniDriver(),
        needs=("num_embeds and num_heads of a transformer",),
        paper="https://arxiv.org/abs/2406.16793",
        summary="AdamW with one second moment for each head, or tensor; learning rates of AdamW serve",
        licence=LICENCE,
        state_bytes="4 (fp32 state for any weights); 8 for embeddings and head",
    ),
)
