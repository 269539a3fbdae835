"""``Observer``: one step of an optimizer, measured. What it puts around the optimizer is there for that step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.telemetry.clock import StepClock
from dist_optim.telemetry.figures import coverage, exchanged_bytes, parts_of, projections_due
from dist_optim.telemetry.ratios import WeightsBefore

__all__ = ["Observer"]


class Observer:
    """Measures the steps that it is asked to.

    ::

        observer = Observer(optimizer)
        with observer.step():         # on all ranks
            optimizer.step()          # under DeepSpeed: engine.step(); steps outside it are as without an observer
        accelerator.log(observer.latest)

    Args:
        optimizer: Of ours: what ``build_optimizer`` or ``prepare`` returned; under DeepSpeed the inner one,
            ``engine.basic_optimizer``. One that steps inside backward has no step to measure, and only what is known
            without one is told.

    Attributes:
        latest: Figures by name; times are this rank's, in seconds, and bytes of state, too.
        steps_in_engine: Whether DeepSpeed steps it, under accelerate inside ``backward``: ``begin`` comes before that.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.steps_in_engine = not isinstance(optimizer, DistributedOptimizer)
        self._parts = parts_of(optimizer)
        self._clock = StepClock(self._parts)
        self._is_inside_backward = any(part.inside_backward is not None for part in self._parts)
        self._clipped: list[Tensor] = []
        self._refresh_s: list[float] = []
        self._counted = optimizer.num_steps
        self._before: WeightsBefore | None = None
        self._has_copies = False
        self._put_back: Callable[[], None] | None = None
        self.latest: dict[str, float] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around ``optimizer.step()``. Collective on several ranks: one small all-reduce."""
        self.begin()
        try:
            yield
        except BaseException:
            self._leave()
            raise
        self.end()

    def begin(self, copies: bool = True) -> None:
        """Before the step: keep copies of this rank's weights, and take the time of what it does.

        Args:
            copies: False for times alone, of a step of which nothing is told but that it renewed projections.
        """
        self._leave()
        self._num_steps, self._step_s, self._has_copies = self._optimizer.num_steps, 0.0, copies
        self._is_running = False
        if self.steps_in_engine:
            self._put_around_engine_steps()
        else:
            self._start()
            self._since = self._clock.now()

    def end(self) -> None:
        """After it: leave the optimizer as it was, and fill ``latest``. Collective on several ranks."""
        if not self.steps_in_engine:
            self._step_s = self._clock.now() - self._since
        is_told, ratios = self._has_copies, self._update_ratios()
        self._leave()
        is_refresh = bool(self._due(self._num_steps))
        if self._is_running and is_refresh:
            self._refresh_s.append(self._clock.seconds["upstream"])
        if is_told:
            times = self._times() if self._is_running else {}
            self.latest = self._known() | times | ratios | self._since_last()

    # Around a step ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._is_inside_backward:
            return
        for part in self._parts:
            part.free_gathered_copies()
        if self._has_copies:
            self._before = WeightsBefore(self._parts)
        self._is_running = True
        self._clock.start()

    def _put_around_engine_steps(self) -> None:
        """DeepSpeed calls ``step`` for each part of the model; the first call begins, and all are timed."""
        own, step = vars(self._optimizer), self._optimizer.step
        had = own.get("step")  # of a schedule of torch's

        def timed(*args: Any, **keywords: Any) -> Any:
            if not self._is_running:
                self._optimizer.show_to_parts()
                self._start()
            since = self._clock.now()
            try:
                return step(*args, **keywords)
            finally:
                self._step_s += self._clock.now() - since

        def put_back() -> None:
            own.pop("step", None)
            if had is not None:
                own["step"] = had

        own["step"], self._put_back = timed, put_back

    def _leave(self) -> None:
        self._before = None
        self._clock.stop()
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    # Clipping -----------------------------------------------------------------------------------------------------

    def watch_clipping(self) -> None:
        """From now on note whether ``clip_grad_norm_`` of the optimizer binds, without waiting for the device.

        Under DeepSpeed, which clips by itself, ``note_engine_clipping`` after each step does.
        """
        if self.steps_in_engine or "clip_grad_norm_" in vars(self._optimizer):
            return
        clip = self._optimizer.clip_grad_norm_

        def clip_grad_norm_(max_norm: float, norm_type: float = 2.0) -> Tensor:
            total = clip(max_norm, norm_type)
            self._clipped.append((total > max_norm).float())
            return total

        vars(self._optimizer)["clip_grad_norm_"] = clip_grad_norm_

    def note_engine_clipping(self) -> None:
        """After a step of DeepSpeed's: note whether its clipping bound; otherwise nothing."""
        found = self._optimizer.clipping() if self.steps_in_engine else None
        if found is not None:
            norm, bound = found
            measured = norm if isinstance(norm, Tensor) else torch.tensor(norm, device="cpu")
            self._clipped.append((measured > bound).float())

    def close(self) -> None:
        """Leave the optimizer as it was before ``watch_clipping``."""
        self._leave()
        if not self.steps_in_engine:
            vars(self._optimizer).pop("clip_grad_norm_", None)

    # Figures ------------------------------------------------------------------------------------------------------

    @property
    def is_refresh_due(self) -> bool:
        """Whether the next step renews projections, so that its time is worth taking."""
        return bool(self._due(self._optimizer.num_steps))

    def _due(self, num_steps: int) -> int:
        return projections_due(self._parts[0].holdings, num_steps)

    def _known(self) -> dict[str, float]:
        """What is known without a step."""
        return {
            "coverage": coverage(self._parts[0].holdings),
            "state_bytes": float(self._optimizer.optimizer_state_bytes()),
            "exchanged_bytes": float(sum(exchanged_bytes(part.holdings) for part in self._parts)),
        }

    def _times(self) -> dict[str, float]:
        return {"step_seconds": self._step_s, **{f"{what}_seconds": s for what, s in self._clock.seconds.items()}}

    def _update_ratios(self) -> dict[str, float]:
        if self._before is None:
            return {}
        if self.steps_in_engine:
            self._optimizer.show_to_parts()
        for part in self._parts:
            part.free_gathered_copies()
        return {f"update_ratio_group_{number}": one for number, one in enumerate(self._before.update_ratios())}

    def _since_last(self) -> dict[str, float]:
        """What has gathered since the figures before these."""
        found: dict[str, float] = {}
        if any("rank" in group for group in self._parts[0].holdings.groups):
            done = range(self._counted, self._optimizer.num_steps)
            found["projections_renewed"] = float(sum(self._due(number) for number in done))
        if self._refresh_s:
            found["refresh_seconds"] = sum(self._refresh_s) / len(self._refresh_s)
        if self._clipped:
            found["clip_rate"] = torch.stack(self._clipped).mean().item()
        self._counted = self._optimizer.num_steps
        self._refresh_s.clear()
        self._clipped.clear()
        return found
