"""bitsandbytes: AdamW and Lion with their state in 8 bits, quantized in blocks of 256 elements of the whole tensor.

Tensors whose rows are whole blocks are stepped where they are cut into rows (FSDP2, HSDP), others whole by an owner.
As under transformers' Trainer, the weights of ``torch.nn.Embedding`` keep a 32-bit state unless ``optim_bits`` is set.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.errors import StateDictError, UnsupportedError
from dist_optim.optimizers.common import betas, epsilon, learning_rate, weight_decay
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

BLOCK = 256
"""Elements that share a scale."""
SCALES = ("absmax1", "absmax2")
WRAPPED = "__bnb_optimizer_quant_state__"
"""Under which bitsandbytes' own ``state_dict()`` hides quantized state from FSDP1."""

__all__ = ["SPECS", "BitsAndBytesDriver", "MIN_8BIT_SIZE", "UnnamedDriver", "isolate_overrides", "refuse_overrides"]


def isolate_overrides(optimizer: Any) -> Any:
    """Give the optimizer a manager of overrides of its own, and return that.

    bitsandbytes (0.50) keeps overrides in one ``GlobalOptimManager`` for the process, by ``id(parameter)`` and by
    position in the groups: those of another model, even of one that is long gone, would reach this optimizer.
    """
    manager_class: Any = type(optimizer.mng)
    optimizer.mng = manager_class.__new__(manager_class)
    optimizer.mng.initialize()
    return optimizer.mng


def registered_overrides(model: nn.Module) -> dict[int, dict[str, Any]]:
    """What the user registered with ``GlobalOptimManager`` for parameters of this model, by ``id(parameter)``."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return {}
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    modules = {id(module) for module in model.modules()}
    registered = {
        id(getattr(module, attribute)): dict(config)
        for module, attribute, config in manager.module_weight_config_triple
        if id(module) in modules
    }
    for parameter in model.parameters():
        if id(parameter) in manager.pid2config:
            registered[id(parameter)] = {**registered.get(id(parameter), {}), **manager.pid2config[id(parameter)]}
    return registered


class BitsAndBytesDriver(UpstreamDriver):
    """Lets each param group have its own ``optim_bits``, and keeps the process-wide overrides out."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        optimizer = super().construct(optimizer_class, param_groups, arguments)
        manager = isolate_overrides(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            bits = group.get("optim_bits", arguments["optim_bits"])
            for position in range(len(group["params"])):
                manager.index2config[number, position] = {"optim_bits": bits}
        return optimizer

    def values_by_parameter(self, model: nn.Module, names: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        return registered_overrides(model)

    def runs_on_rows(self, shape: torch.Size, fewest: int, values: Mapping[str, Any]) -> bool:
        row, smallest = shape[1:].numel(), values["min_8bit_size"]
        has_8_bits = values["optim_bits"] == 8 and shape.numel() >= smallest  # a part must be of the same kind
        return row % BLOCK == 0 and (fewest * row >= smallest or not has_8_bits)

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The scales of blocks that cut no row lie as the rows do, so that they are cut as the parameter is."""
        state = {**state, **state.get(WRAPPED, {})}
        state.pop(WRAPPED, None)
        encoded = super().encode_state(state)
        codes = encoded.get("state1")
        if isinstance(codes, Tensor) and codes.ndim > 1 and codes.shape[1:].numel() % BLOCK == 0:
            rows = (codes.shape[0], -1, *(1,) * (codes.ndim - 2))
            encoded |= {key: encoded[key].view(rows) for key in SCALES if key in encoded}
        return encoded

    def as_upstream_has_it(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value.reshape(-1) if key in SCALES else value for key, value in encoded.items()}

    def decode_state(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        state = self.as_upstream_has_it(super().decode_state(encoded, group), group)
        for key in SCALES:
            if key in state and state[key].numel() != -(-state["state1"].numel() // BLOCK):
                raise StateDictError(
                    f"{key!r} has {state[key].numel()} scales, and the {state['state1'].numel()} codes beside it have "
                    f"one for each {BLOCK}: the file is from before scales were cut as rows are. Load it in one "
                    "process or under DDP, and save it there again."
                )
        return state


def refuse_overrides(model: nn.Module, name: str, why: str) -> None:
    """Refuse what the user registered for this model where the optimizer cannot obey it."""
    overrides = registered_overrides(model)
    if overrides:
        raise UnsupportedError(
            f"{name}: bitsandbytes' GlobalOptimManager holds overrides for {len(overrides)} of this model's parameters "
            f"(the first: {next(iter(overrides.values()))}), {why}. Remove them from the manager, or use "
            "adamw_bnb_8bit, which obeys them."
        )


class UnnamedDriver(UpstreamDriver):
    """bitsandbytes' classes that have no name here: without overrides, which hold the user's parameters by ``id``."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        optimizer = super().construct(optimizer_class, param_groups, arguments)
        isolate_overrides(optimizer)
        return optimizer

    def values_by_parameter(self, model: nn.Module, names: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        refuse_overrides(model, "bitsandbytes", "which reach no class without a name in dist_optim")
        return {}


MIN_8BIT_SIZE = Hyperparameter(
    name="min_8bit_size",
    kind="int",
    default=4096,
    minimum=0,
    scope=Scope.CONSTRUCTOR,
    meaning="tensors with fewer elements keep a 32-bit state; the whole tensor counts, not a rank's part",
)
_OPTIM_BITS = Hyperparameter(
    name="optim_bits",
    kind="int",
    default=8,
    choices=(8, 32),
    meaning="bits of an element of the state; when unset, weights of torch.nn.Embedding have 32, as in the Trainer",
)
_COMMON: dict[str, Any] = {
    "package": "bitsandbytes",
    "extra": "bnb",
    "traits": frozenset({Trait.BLOCKWISE, Trait.WHOLE_TENSOR}),
    "driver": BitsAndBytesDriver(),
    "licence": "MIT",
    "embedding_defaults": {"optim_bits": 32},
}

SPECS = (
    OptimizerSpec(
        name="adamw_bnb_8bit",
        load=UpstreamClass("bitsandbytes.optim", "AdamW"),
        hyperparameters=(learning_rate(), betas(), epsilon(), weight_decay(0.0), _OPTIM_BITS, MIN_8BIT_SIZE),
        paper="https://arxiv.org/abs/2110.02861",
        summary="AdamW with both moments in 8 bits",
        state_bytes="2.03; 8 for embeddings and below 4096 elements",
        **_COMMON,
    ),
    OptimizerSpec(
        name="lion_8bit",
        load=UpstreamClass("bitsandbytes.optim", "Lion"),
        hyperparameters=(learning_rate(1e-4), betas(), weight_decay(0.0), _OPTIM_BITS, MIN_8BIT_SIZE),
        paper="https://arxiv.org/abs/2302.06675",
        summary="Lion (sign of a running average) with its moment in 8 bits",
        state_bytes="1.02; 4 for embeddings and below 4096 elements",
        **_COMMON,
    ),
)
