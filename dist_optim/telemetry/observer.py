"""``Observer``: one step of an optimizer, measured. What it puts around the optimizer is there for that step alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.telemetry.figures import coverage, exchanged_bytes, projections_due

__all__ = ["Observer"]


class Observer:
    """Measures the steps that it is asked to.

    ::

        observer = Observer(optimizer)
        with observer.step():         # on all ranks
            optimizer.step()          # steps outside it are as without an observer
        accelerator.log(observer.latest)

    Args:
        optimizer: Stepped from stored gradients; one that steps inside backward has no step to measure, and only what
            is known without one is told.

    Attributes:
        latest: Figures by name; times are this rank's, in seconds, and bytes of state, too.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._clipped: list[Tensor] = []
        self.latest: dict[str, float] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around ``optimizer.step()``. Collective on several ranks: one small all-reduce."""
        self.begin()
        try:
            yield
        finally:
            self._leave()
        self.end()

    def begin(self) -> None:
        """Before the step: keep copies of this rank's weights, and take the time of upstream's steps."""
        self._upstream_s, self._before = 0.0, {}
        if self._optimizer.inside_backward is None:
            self._optimizer.free_gathered_copies()
            self._before = {index: one.clone() for index, one in self._weights()}
            for instance in self._optimizer.holdings.instances:
                vars(instance)["step"] = self._timed(instance.step)
        self._num_steps = self._optimizer.num_steps
        self._since = self._now()

    def end(self) -> None:
        """After it: leave the optimizer as it was, and fill ``latest``. Collective on several ranks."""
        step_s = self._now() - self._since
        self._leave()
        optimizer, held = self._optimizer, self._optimizer.holdings
        figures: dict[str, float] = {
            "coverage": coverage(held),
            "state_bytes": float(optimizer.optimizer_state_bytes()),
            "exchanged_bytes": float(exchanged_bytes(held)),
        }
        if optimizer.inside_backward is None:
            figures |= {"step_seconds": step_s, "upstream_seconds": self._upstream_s}
            figures["exchange_seconds"] = max(0.0, step_s - self._upstream_s)
            figures |= self._update_ratios()
        if any("rank" in group for group in held.groups):
            figures["projections_renewed"] = float(projections_due(held, self._num_steps))
        self.latest = figures | self._clip_rate()
        self._before = {}

    # Clipping -----------------------------------------------------------------------------------------------------

    def watch_clipping(self) -> None:
        """From now on note whether ``clip_grad_norm_`` of the optimizer binds, without waiting for the device."""
        if "clip_grad_norm_" in vars(self._optimizer):
            return
        clip = self._optimizer.clip_grad_norm_

        def clip_grad_norm_(max_norm: float, norm_type: float = 2.0) -> Tensor:
            total = clip(max_norm, norm_type)
            self._clipped.append((total > max_norm).float())
            return total

        vars(self._optimizer)["clip_grad_norm_"] = clip_grad_norm_

    def close(self) -> None:
        """Leave the optimizer as it was before ``watch_clipping``."""
        self._leave()
        vars(self._optimizer).pop("clip_grad_norm_", None)

    def _clip_rate(self) -> dict[str, float]:
        if not self._clipped:
            return {}
        rate = torch.stack(self._clipped).mean().item()
        self._clipped.clear()
        return {"clip_rate": rate}

    # Measuring ----------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        for instance in self._optimizer.holdings.instances:
            vars(instance).pop("step", None)

    def _timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            since = self._now()
            try:
                return step(*args, **keywords)
            finally:
                self._upstream_s += self._now() - since

        return timed

    def _now(self) -> float:
        """Seconds, once the device has come so far."""
        device = self._optimizer.holdings.placed[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _weights(self) -> Iterator[tuple[int, Tensor]]:
        """This rank's part of what is trained; of replicated tensors the first rank's alone."""
        held = self._optimizer.holdings
        for index in held.trained:
            one = held.placed[index]
            if not isinstance(one.layout, Elsewhere) and (not one.layout.is_replicated or held.rank == 0):
                yield index, one.local()

    def _update_ratios(self) -> dict[str, float]:
        """Of each group, the norm of the update over the norm of the weights, of whole tensors."""
        held = self._optimizer.holdings
        group_of = [number for number, members in enumerate(held.members) for _ in members]
        sums = torch.zeros(2, len(held.groups), dtype=torch.float64, device=held.placed[0].device)
        self._optimizer.free_gathered_copies()
        for index, weight in self._weights():
            before = self._before[index].double()
            sums[0, group_of[index]] += (weight.double() - before).square().sum()
            sums[1, group_of[index]] += before.square().sum()
        if num_ranks(held.process_group) > 1:
            dist.all_reduce(sums, group=held.process_group)
        moved, size = sums.sqrt().tolist()
        return {
            f"update_ratio_group_{number}": up / down if down else 0.0
            for number, (up, down) in enumerate(zip(moved, size, strict=True))
        }
