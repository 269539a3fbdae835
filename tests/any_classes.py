"""Optimizer classes made as traps, one mechanism each: what published classes do besides stepping each tensor alone."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class Trap(Optimizer):
    """Signed descent with a hook for the mechanism: the base of the traps."""

    def __init__(self, params: Any, lr: float = 1e-2, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(self.direction(parameter, group), alpha=-group["lr"])
        self.after()
        return loss

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad / (1 + parameter.grad.norm())

    def before(self) -> None:
        """What it does with all tensors first."""

    def after(self) -> None:
        """What it does with all tensors at last."""

    def everything(self) -> list[Tensor]:
        return [one for group in self.param_groups for one in group["params"]]


class PullsToStart(Trap):
    """Keeps the weights that it was constructed with, and pulls towards them."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        for parameter in self.everything():
            self.state[parameter]["start"] = parameter.detach().clone()

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, group) + 0.1 * (parameter - self.state[parameter]["start"])


class KeepsAlias(Trap):
    """Keeps the tensor behind a parameter, and writes through it."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.behind = [one.data for one in self.everything()]

    def after(self) -> None:
        for tensor in self.behind:
            tensor.mul_(0.999)


class NormsAtStart(Trap):
    """Scales every step by the norm of all weights at the start: an attribute."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.norm = float(sum(one.detach().double().norm() for one in self.everything()))

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, group) * self.norm / 50


class DecaysItsRate(Trap):
    """Writes its own learning rate."""

    def after(self) -> None:
        for group in self.param_groups:
            group["lr"] *= 0.9


class WarmsMomentum(Trap):
    """Warms its momentum up, under a constructor's own name."""

    def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.5) -> None:
        super().__init__(params, lr, momentum=momentum)

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        state["average"] = group["momentum"] * state.get("average", 0.0) + super().direction(parameter, group)
        return state["average"]

    def after(self) -> None:
        for group in self.param_groups:
            group["momentum"] = min(0.95, group["momentum"] + 0.05)


class ClipsTogether(Trap):
    """Clips by the norm of all gradients."""

    def before(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.everything(), 0.1)


class ClipsLate(Trap):
    """Couples its tensors from the fourth step on."""

    count = 0

    def before(self) -> None:
        self.count += 1
        if self.count > 3:
            torch.nn.utils.clip_grad_norm_(self.everything(), 0.1)


class DrawsNoise(Trap):
    """Adds noise from the global generators of torch, of Python and of numpy."""

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, group) + torch.randn_like(parameter) * random.random() * np.random.rand()


class TakesMissingAsZero(Trap):
    """Steps a parameter without a gradient as if it had one of zeros: momentum and decay go on."""

    def before(self) -> None:
        for parameter in self.everything():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        state["average"] = 0.9 * state.get("average", 0.0) + super().direction(parameter, group)
        return state["average"] + 0.01 * parameter


class Schedule:
    """An object with numbers of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen = deque([1.0], maxlen=3)

    def factor(self) -> float:
        self.calls += 1
        self.seen.append(1.0 / self.calls)
        return sum(self.seen)


class KeepsAttributes(Trap):
    """Keeps its progress outside ``state``: a count, and an object."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.count = 0
        self.schedule = Schedule()
        self.factor = 1.0

    def before(self) -> None:
        self.count += 1
        self.factor = self.schedule.factor() / self.count
        self.state["shared"] = self.state.get("shared", 0) + 1  # type: ignore[index,call-overload]

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, group) * (self.factor + 0.1 * self.state["shared"])  # type: ignore[index]


class NestedState(Trap):
    """Keeps lists, tuples, deques, dicts and objects in the state of a parameter."""

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["recent"] = deque(maxlen=3)
            state["by dim"] = [torch.zeros(size) for size in parameter.shape]
            state["pair"] = (0, {"schedule": Schedule(), 3: None})
        direction = super().direction(parameter, group)
        state["recent"].append(direction.clone())
        count, other = state["pair"]
        state["pair"] = (count + 1, other)
        for dim, total in enumerate(state["by dim"]):
            total += direction.float().abs().sum([other for other in range(direction.ndim) if other != dim])
        scale = sum(float(total.sum()) for total in state["by dim"]) + other["schedule"].factor()
        return sum(state["recent"]) / (1 + scale + count)


class FollowsDistance(Trap):
    """Finds its own rate from the distance that all tensors have moved, as D-Adaptation does; writes it to groups."""

    def __init__(self, params: Any, lr: float = 1e-2, d: float = 1e-3) -> None:
        super().__init__(params, lr, d=d)

    def before(self) -> None:
        total = 0.0
        for parameter in self.everything():
            if parameter.grad is not None:
                start = self.state[parameter].setdefault("start", parameter.detach().clone())
                total += float((parameter - start).abs().sum() + parameter.grad.abs().sum())
        for group in self.param_groups:
            group["d"] = max(group["d"], 1e-4 * total)

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, group) * group["d"]


class SlowWeights(Optimizer):
    """An optimizer around another: every third step goes back towards slow weights, kept from the start."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        self.inner = torch.optim.Adam(params, lr=lr)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups
        self.count = 0
        self.slow = {one: one.detach().clone() for group in self.param_groups for one in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        if self.count % 3 == 0:
            for parameter, slow in self.slow.items():
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class Averages(Trap):
    """Swaps averaged weights in for evaluation, of what has any."""

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        state["average"] = state.get("average", parameter).lerp(parameter, 0.1)
        return super().direction(parameter, group)

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, state in self.state.items():
                kept = parameter.clone()
                parameter.copy_(state["average"])
                state["average"] = kept

    def train(self) -> None:
        if self.defaults.pop("is_averaged", False):
            self._swap()

    def eval(self) -> None:
        if not self.defaults.get("is_averaged"):
            self.defaults["is_averaged"] = True
            self._swap()


class Ascends(Trap):
    """Evaluates twice: at the weights, and up the gradient from there (as sharpness-aware minimization does)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        closure = torch.enable_grad()(closure)
        loss = closure()
        climbed = {one: 0.05 * one.grad for one in self.everything() if one.grad is not None}
        for parameter, up in climbed.items():
            parameter.add_(up)
        closure()
        for parameter, up in climbed.items():
            parameter.sub_(up)
        super().step()
        return loss


class AscendsInTwoCalls(Trap):
    """As ``Ascends``, by two methods between which the loop evaluates again; the first clears gradients."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for parameter in self.everything():
            if parameter.grad is not None:
                self.state[parameter]["before"] = parameter.detach().clone()
                parameter.add_(parameter.grad, alpha=0.05)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.everything():
            if "before" in self.state[parameter]:
                parameter.copy_(self.state[parameter].pop("before"))
        Trap.step(self)


class FollowsLoss(Trap):
    """Its steps grow with the loss that the closure returns."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.scale = 1.0 if loss is None else float(loss)
        super().step()
        return loss

    def direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, group) * self.scale


TRAPS: tuple[type[Optimizer], ...] = (
    PullsToStart,
    KeepsAlias,
    NormsAtStart,
    DecaysItsRate,
    WarmsMomentum,
    ClipsTogether,
    ClipsLate,
    DrawsNoise,
    TakesMissingAsZero,
    KeepsAttributes,
    NestedState,
    FollowsDistance,
    SlowWeights,
)


class Averaging(SGD):
    """Keeps an average of the weights, swaps it in, and counts its own zero_grad."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.weight = 0.5
        self.num_cleared = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("average", p.detach().clone()).lerp_(p.detach(), self.weight)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.num_cleared += 1
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def swap(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "average" in self.state[p]:
                    average = self.state[p]["average"].clone()
                    self.state[p]["average"].copy_(p)
                    p.copy_(average)

    @torch.no_grad()
    def halve_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)

    def name_of_it(self) -> str:
        return "averaging"
