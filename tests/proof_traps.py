"""Optimizer classes that depend on other tensors, each in a way of its own, and some that look as if they did."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Plain(torch.optim.Optimizer):
    """Gradient descent; what is wrong comes in the classes below."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        self.count = 0

    def with_gradient(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group, parameter

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.count += 1
        scale = self.scale()
        for group, parameter in self.with_gradient():
            parameter.add_(self.update(group, parameter), alpha=-group["lr"] * scale)

    def scale(self) -> float:
        return 1.0

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        gradient: Tensor = parameter.grad
        return gradient / (gradient.norm() + 1.0)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for _, parameter in self.with_gradient()]


class CouplesLate(Plain):
    """After 499 steps it divides by a norm over all."""

    @torch.no_grad()
    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        if self.count < 500:
            return super().update(group, parameter)
        return parameter.grad / torch.stack([one.norm() for one in self.gradients()]).norm()


class BoundNeverBinds(Plain):
    """A clip by a norm over all that is far away, and left out where that is infinite."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        total = torch.stack([one.norm() for one in self.gradients()]).norm()
        return super().update(group, parameter) * (1e30 / (total.nan_to_num(0.0, 0.0) + 1e-6)).clamp(max=1.0)


class BoundForLargeGradients(Plain):
    """A clip in Python, which binds only where the sum is large."""

    def scale(self) -> float:
        total = sum(one.norm().item() ** 2 for one in self.gradients()) ** 0.5
        return min(1.0, 1e7 / (total + 1e-6))


class ClipsThroughItem(Plain):
    """A global clip whose sum is taken in Python."""

    def scale(self) -> float:
        total = sum(float(one.square().sum()) for one in self.gradients())
        return 1.0 / (1.0 + total)


class ClipsThroughList(Plain):
    """The same, by a bound that is never reached, through ``tolist``."""

    def scale(self) -> float:
        total = sum(abs(value) for one in self.gradients() for value in one.flatten().tolist())
        return 1.0 if total < 1e13 else 0.5


class StopsWhenOneIsClose(Plain):
    """Rests where a tensor's momentum is its gradient, which hardly ever is so; asked by ``allclose``."""

    def scale(self) -> float:
        close = [torch.allclose(one, one * 2.0 - 1e20) for one in self.gradients()]
        return 0.0 if any(close) else 1.0


class ClipsThroughNumpy(Plain):
    """The same through numpy."""

    def scale(self) -> float:
        total = sum(float(np.abs(one.float().cpu().numpy()).sum()) for one in self.gradients())
        return 1.0 if total < 1e13 else 0.5


class DrawsLate(Plain):
    """Noise after 300 steps."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        noise = torch.rand_like(parameter) if self.count > 300 else 0.0
        return super().update(group, parameter) + noise


class DrawsForLarge(Plain):
    """Noise for large matrices alone."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        noise = torch.rand_like(parameter) if parameter.numel() > 300 else 0.0
        return super().update(group, parameter) + noise


class DrawsInPython(Plain):
    """Python's own generator."""

    def scale(self) -> float:
        return 1.0 if self.count < 200 else random.random()


class DrawsInNumpy(Plain):
    """Numpy's."""

    def scale(self) -> float:
        return 1.0 if self.count < 200 else np.random.random()


class ReadsAbsentAsZero(Plain):
    """Momentum also for what has no gradient."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                state = self.state[parameter]
                state["momentum"] = 0.9 * state.get("momentum", 0.0) + parameter.grad
                parameter.add_(state["momentum"] / (state["momentum"].norm() + 1.0), alpha=-group["lr"])


class CapturesMean(Plain):
    """Pulls every tensor to the mean of all of them at the start."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        every = [parameter.detach() for group in self.param_groups for parameter in group["params"]]
        self.anchor = torch.stack([one.float().mean() for one in every]).mean()

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        return super().update(group, parameter) + (parameter - self.anchor).to(parameter.dtype)


class CountsWithGradient(Plain):
    """Its rate falls with the position among the parameters with a gradient."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for position, parameter in enumerate(with_gradient):
                parameter.add_(self.update(group, parameter), alpha=-group["lr"] / (1 + position))


class StacksEqualShapes(Plain):
    """Tensors of one shape are updated together, by a norm over all of them."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        alike: dict[torch.Size, list[Any]] = {}
        for _, parameter in self.with_gradient():
            alike.setdefault(parameter.shape, []).append(parameter)
        for members in alike.values():
            stacked = torch.stack([one.grad for one in members])
            for one, update in zip(members, stacked / (stacked.norm() + 1.0), strict=True):
                one.add_(update, alpha=-self.param_groups[0]["lr"])


class FirstTensorLeads(Plain):
    """The rate of each group follows its first tensor."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first = group["params"][0] if group["params"] else None
            if first is not None and first.grad is not None:
                group["pace"] = 1.0 / (1.0 + first.grad.norm().item())
        super().step()

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        return super().update(group, parameter) * group.get("pace", 1.0)


class ClipsGlobally(torch.optim.SGD):
    """torch's own clip inside ``step``, at a bound that is seldom reached."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e6)
        super().step()


class NeverMoves(Plain):
    """Nothing happens."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        return torch.zeros_like(parameter)


class EvaluatesTwice(Plain):
    """Two evaluations of the closure a step, where there is one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
            closure()
        super().step()


class Communicates(Plain):
    """Averages gradients itself."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        torch.distributed.all_reduce(parameter.grad)
        return super().update(group, parameter)


class CompiledClip(Plain):
    """A norm over all in a compiled function, which a trace cannot enter."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter, update in zip(*compiled(list(self.with_gradient())), strict=True):
            parameter.sub_(update)


@torch.compile
def compiled(members: list[tuple[dict[str, Any], Any]]) -> tuple[list[Any], list[Tensor]]:
    total = sum(parameter.grad.norm() for _, parameter in members)
    return [one for _, one in members], [group["lr"] * one.grad / (1.0 + total) for group, one in members]


# Independent ------------------------------------------------------------------------------------------------------


class SignMomentum(Plain):
    """As Lion is."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        update = momentum.lerp(parameter.grad, 0.1).sign()
        momentum.lerp_(parameter.grad, 0.01)
        return update


NOT_GIVEN = object()


class HasObjectDefault(SignMomentum):
    """A default that is no plain value, as packages write it that tell "not given" from None; it is in a group, too."""

    def __init__(self, params: Any, lr: float = 1e-2, rule: Any = NOT_GIVEN) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["rule"] = rule


class ClipsEachByItem(Plain):
    """A bound on each tensor's own norm, read in Python."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        size = parameter.grad.float().square().mean().sqrt().item()
        return parameter.grad * (1.0 / size) if size > 1.0 else parameter.grad.clone()


class UsesScratch(Plain):
    """One buffer that all tensors of a size use in turn."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        if not hasattr(self, "scratch"):
            self.scratch: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        buffer = self.scratch.setdefault((parameter.shape, parameter.dtype), torch.zeros_like(parameter))
        buffer.copy_(parameter.grad)
        return buffer.sign_()


class Averages(Plain):
    """Swaps weights for evaluation."""

    def train(self) -> None:
        self._swap("training")

    def eval(self) -> None:
        self._swap("average")

    @torch.no_grad()
    def _swap(self, mode: str) -> None:
        if getattr(self, "mode", "training") == mode:
            return
        self.mode = mode
        for group in self.param_groups:
            for parameter in group["params"]:
                if "average" in self.state[parameter]:
                    kept = parameter.clone()
                    parameter.copy_(self.state[parameter]["average"])
                    self.state[parameter]["average"].copy_(kept)

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        self.state[parameter].setdefault("average", parameter.clone()).lerp_(parameter, 0.1)
        return super().update(group, parameter)


class RareBranch(Plain):
    """Independent in all that a proof runs; above a size that none reaches it adds what all have in common."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        update = super().update(group, parameter)
        if parameter.numel() > 1_000_000:
            total = sum(self.gradients())
            update = update + total
        return update


class RareCall(Plain):
    """The same in a function of its own."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        return never_entered(parameter) if parameter.numel() > 1_000_000 else super().update(group, parameter)


class CatchesAll(Plain):
    """It calls that function, and swallows whatever is raised."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        try:
            return never_entered(parameter) if parameter.numel() > 1_000_000 else super().update(group, parameter)
        except Exception:
            return super().update(group, parameter)


class RaisesForLarge(Plain):
    """An error of its own for what no proof tries."""

    def update(self, group: dict[str, Any], parameter: Any) -> Tensor:
        if parameter.numel() > 1_000_000:
            raise ArithmeticError("too large")
        return super().update(group, parameter)


def never_entered(parameter: Any) -> Tensor:
    return parameter.grad * 2.0
