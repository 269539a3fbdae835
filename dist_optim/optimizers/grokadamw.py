"""GrokAdamW: AdamW on gradients whose slow components are amplified; its first beta decays from layer to layer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dist_optim.errors import UnsupportedError
from dist_optim.optimizers.common import betas, epsilon, learning_rate, weight_decay
from dist_optim.specs.driver import ParamGroup, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass


@dataclass(frozen=True, slots=True)
class ImportedQuietly(UpstreamClass):
    """Loads the class, and leaves the root logger as the user configured it.

    grokadamw 0.1.2 calls ``logging.basicConfig(level=INFO)`` when it is imported: a root logger without handlers then
    prints every library's INFO messages, and the user's own ``basicConfig`` does nothing.
    """

    def __call__(self) -> type[Optimizer]:
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        try:
            return UpstreamClass.__call__(self)
        finally:
            for handler in [handler for handler in root.handlers if handler not in handlers]:
                root.removeHandler(handler)
            root.setLevel(level)


class _ByPlace(float):
    """One minus gamma: its n-th power is that of the n-th tensor's place, since upstream counts what it is given."""

    places: list[int]

    def __pow__(self, at: int) -> float:  # type: ignore[override]
        return float(self) ** self.places[at]


class _Gamma(float):
    """A gamma that knows which places in the whole group the tensors have that upstream will step."""

    places: list[int]

    def __rsub__(self, one: float) -> float:
        rest = _ByPlace(one - float(self))
        rest.places = self.places
        return rest


class GrokAdamWDriver(UpstreamDriver):
    """Finds the state where upstream keeps it, and tells it each tensor's place: its first beta decays by that.

    grokadamw 0.1.2 computes ``beta1 * (1 - group["gamma"]) ** i``. Ghosts with gradients would count too, but upstream
    steps each of them in each round, at the cost of a small tensor.
    """

    counts_places = True
    signals = ("train_loss", "eval_loss")

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        if any({**arguments, **group}.get("grokking_signal_fns") is not None for group in param_groups):
            raise UnsupportedError(
                "grokadamw: grokking_signal_fns are called inside each owner's step, as often as it has rounds, on "
                "what that rank sees: the trajectory would depend on the sharding. Set the losses instead, equal on "
                "all ranks: optimizer.param_groups[i]['train_loss'] and ['eval_loss']."
            )
        # grokadamw 0.1.2 enters torch.cuda.amp.autocast for every parameter: deprecated, and disabled without CUDA.
        warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.autocast", FutureWarning, r"grokadamw\b")
        warnings.filterwarnings("ignore", ".*CUDA is not available", UserWarning, r"torch\.(cuda\.)?amp\.autocast_mode")
        # Upstream reads the losses from its groups, where the user puts them, but takes them as no argument.
        losses = {key: arguments[key] for key in self.signals}
        taken = {key: value for key, value in arguments.items() if key not in self.signals}
        return super().construct(optimizer_class, [{**losses, **group} for group in param_groups], taken)

    def take_places(self, optimizer: Optimizer, places: list[list[int]]) -> None:
        for group, own in zip(optimizer.param_groups, places, strict=True):
            group["gamma"] = _Gamma(group["gamma"])
            group["gamma"].places = own

    def read_state(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
        # grokadamw 0.1.2 keeps state in group["state"], keyed by parameters: its own state_dict pickles the
        # parameters, and what it loads is keyed by others, so that a resumed run starts from zero.
        return _group_of(optimizer, parameter).get("state", {}).get(parameter, {})

    def write_state(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        on_host = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
        _group_of(optimizer, parameter).setdefault("state", {})[parameter] = on_host

    def clear_state(self, optimizer: Optimizer, parameter: Tensor) -> None:
        _group_of(optimizer, parameter).get("state", {}).pop(parameter, None)


def _group_of(optimizer: Optimizer, parameter: Tensor) -> ParamGroup:
    return next(group for group in optimizer.param_groups if any(own is parameter for own in group["params"]))


def _loss(name: str, meaning: str) -> Hyperparameter:
    return Hyperparameter(name=name, kind="float", default=None, optional=True, meaning=meaning)


SPECS = (
    OptimizerSpec(
        name="grokadamw",
        load=ImportedQuietly("grokadamw", "GrokAdamW"),
        package="grokadamw",
        extra="grok",
        traits=frozenset({Trait.WHOLE_TENSOR, Trait.POSITION_DEPENDENT}),
        hyperparameters=(
            learning_rate(),
            betas(),
            epsilon(),
            weight_decay(0.0),
            Hyperparameter(
                name="alpha_init",
                kind="float",
                default=0.98,
                minimum=0.0,
                maximum=1.0,
                meaning="decay rate of the slow average of the gradient",
            ),
            Hyperparameter(
                name="lamb",
                kind="float",
                default=2.0,
                minimum=0.0,
                meaning="weight of the slow average in the gradient",
            ),
            Hyperparameter(
                name="gamma",
                kind="float",
                default=0.1,
                minimum=0.0,
                maximum=1.0,
                meaning="decay of the first beta from one tensor of a param group to the next that has a gradient",
            ),
            Hyperparameter(
                name="grokking_signal_fns",
                kind="any",
                default=None,
                scope=Scope.CONSTRUCTOR,
                meaning="refused: set train_loss and eval_loss in the param groups",
            ),
            Hyperparameter(
                name="grokking_signal_decay_rate",
                kind="float",
                default=0.1,
                minimum=0.0,
                meaning="how fast alpha falls with the gap between evaluation and training loss",
            ),
            Hyperparameter(
                name="gradient_clipping",
                kind="float",
                default=1.0,
                minimum=0.0,
                meaning="largest norm of one tensor's gradient; 0 clips nothing",
            ),
            _loss("train_loss", "latest training loss, equal on all ranks; to be set in the param groups"),
            _loss("eval_loss", "latest evaluation loss, likewise"),
        ),
        driver=GrokAdamWDriver(),
        paper="https://arxiv.org/abs/2405.20233",
        summary="AdamW with amplified slow gradients (Grokfast) and a first beta that decays by layer",
        licence="MIT",
        state_bytes="12 (fp32), in host memory",
    ),
)
