"""DeepSpeed's engines as checkpoints of dist_optim see them: fp32 masters in slices, and a model that follows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from dist_optim.checkpoint.engine_view import EngineView
from dist_optim.checkpoint.loss_scale import LossScale
from dist_optim.integrations.deepspeed.push_weights import push_weights
from dist_optim.layouts.detect import PlacedParameter, assert_held_by, named_parameters
from dist_optim.layouts.detect_zero import stored_place
from dist_optim.ranks.meeting import meet
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["ZeroView"]

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's loss scalers that training changes."""


class InParts(Protocol):
    """The optimizer of an engine, as far as checkpoints need it."""

    training_weights: Any

    def parts(self) -> list[DistributedOptimizer]: ...

    def trained_in_model(self) -> list[PlacedParameter]: ...

    def show_to_parts(self) -> None: ...

    def show_from_parts(self) -> None: ...

    def why_not_saved(self) -> str: ...


class ZeroView(EngineView):
    """A ``ZeroOptimizer`` and its engine, under any stage."""

    def __init__(self, optimizer: InParts, engine: Any) -> None:
        super().__init__(optimizer, optimizer.parts())
        self._optimizer = optimizer
        self._engine = engine

    @property
    def has_masters(self) -> bool:  # type: ignore[override]
        held = {one.parameter.dtype for one in self._optimizer.trained_in_model()}
        return any(one.dtype not in held for one in self.training_weights())

    def model_parameters(self, model: nn.Module) -> Mapping[str, PlacedParameter]:
        assert_held_by(model, self._optimizer.trained_in_model())
        module = self._engine.module
        return {fqn: stored_place(fqn, one, at) for at, (fqn, one) in enumerate(named_parameters(module))}

    def meet(self, call: str) -> None:
        meet(call)

    def why_not_saved(self) -> str:
        return self._optimizer.why_not_saved()

    def why_not_loaded(self) -> str:
        if not self.why_not_saved():
            return ""
        return (
            "A step of this engine failed half way, and DeepSpeed keeps gradients of it. Call deepspeed.initialize "
            "anew, and load into the new engine."
        )

    def look(self) -> None:
        self._optimizer.show_to_parts()

    def refresh(self) -> None:
        self._optimizer.training_weights = None
        self._optimizer.show_from_parts()
        push_weights(self._engine)

    @property
    def schedule(self) -> Any:
        return self._engine.lr_scheduler

    def counters(self) -> dict[str, Any]:
        found = {name: getattr(self._engine, name) for name in _COUNTERS}
        scale = {name: getattr(scaler, name) for scaler in self._scalers() for name in _LOSS_SCALE}
        return found | ({"loss_scale": scale} if scale else {})

    def take_counters(self, counters: Mapping[str, Any], num_steps: int) -> None:
        batch = self._engine.train_batch_size()
        usual = {"global_steps": num_steps, "global_samples": num_steps * batch, "skipped_steps": 0}
        for name in _COUNTERS:
            setattr(self._engine, name, counters.get(name, usual[name]))
        for scaler in self._scalers():
            vars(scaler).update(counters.get("loss_scale", {}))

    def take_loss_scale(self, found: LossScale) -> None:
        for scaler in self._scalers():
            vars(scaler).update(found.for_engine(scaler, self._engine.global_steps))

    def _scalers(self) -> Iterator[Any]:
        """The dynamic loss scaler of fp16, where there is one."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if all(hasattr(scaler, name) for name in _LOSS_SCALE):
            yield scaler
