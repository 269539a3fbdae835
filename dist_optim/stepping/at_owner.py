"""Gradients that lie whole at their owners when backward ends, and what stands in their place on the parameters.

An engine that is told the owners sends gradients there as backward produces them (``inside_backward.to_owners``), and
no rank has the part of them that it would have otherwise. ``parameter.grad`` then is an ``AtOwner``: it says that
there is a gradient, takes what scales it, and tells everyone else where the gradient is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import UnsupportedError
from dist_optim.exchange.plan import Bucket, Route
from dist_optim.exchange.rooms import Room
from dist_optim.exchange.tasks import Task
from dist_optim.exchange.transfer import gather_to_owner
from dist_optim.layouts.detect import PlacedParameter

__all__ = ["AtOwner", "Whole", "bring", "forget_weights", "there_and_parts", "weights_changed"]

SAMPLED = 64
"""Elements of a part by which a change of weights is noticed that torch does not count (through ``.data``)."""

_aten = torch.ops.aten
_SCALING: dict[Any, Callable[..., Tensor]] = {
    _aten.mul_.Tensor: Tensor.mul_,
    _aten.mul_.Scalar: Tensor.mul_,
    _aten.div_.Tensor: Tensor.div_,
    _aten.div_.Scalar: Tensor.div_,
    _aten.zero_.default: Tensor.zero_,
    _aten._foreach_mul_.Scalar: Tensor.mul_,
    _aten._foreach_mul_.Tensor: Tensor.mul_,
    _aten._foreach_div_.Scalar: Tensor.div_,
    _aten._foreach_div_.Tensor: Tensor.div_,
    _aten._foreach_zero_.default: Tensor.zero_,
}
"""What scales gradients, and the same of one tensor."""


class Whole:
    """One parameter's whole gradient, and its values, as backward has left them with its owner.

    Args:
        placed: The parameter.
        owner: Who steps it.
        rank: This rank.
        may_be_kept: Whether upstream may keep the gradient that it is given, so that each needs memory of its own.
    """

    def __init__(self, placed: PlacedParameter, owner: int, rank: int, may_be_kept: bool = False) -> None:
        self.name, self.shape, self.dtype = placed.fqn, placed.shape, placed.dtype
        self.owner, self.is_mine = owner, owner == rank
        self._layout, self._rank, self._may_be_kept = placed.layout, rank, may_be_kept
        self.gradient: Tensor | None = None
        """At the owner."""
        self.landing: Tensor | None = None
        """Where it arrives, row by row, with the engine's padding."""
        self.values: Tensor | None = None
        """At the owner: the parameter, where the engine had it whole."""
        self.mark: tuple[int, Tensor] | None = None
        """What this rank's part of the parameter was then; None where it was not taken."""
        self.is_arriving = False
        """Whether the engine is about to add what it believes is this rank's part of the gradient."""

    def land(self, num_rows: int, row: int, device: torch.device, is_added: bool) -> Tensor:
        """Memory for the gradient in rows of equal size, aligned as a tensor's own.

        Taken once; where it may be kept, for each gradient that is not added to the last.
        """
        if self.landing is None or (self._may_be_kept and not is_added):
            self.landing = torch.empty(num_rows, row, dtype=self.dtype, device=device)
            self.gradient = self.landing.view(-1)[: self.shape.numel()].view(self.shape)
        return self.landing

    def take_values(self, full: Tensor | None, part: Tensor) -> None:
        """Keep the parameter's values, which the engine has gathered; None where it has not.

        Args:
            full: What it has gathered, maybe before this rank's part was changed.
            part: This rank's part.
        """
        if full is None:
            self.mark = None
            return
        self.mark = part._version, _sample(self._layout.view_of(full, self._rank)).clone()
        if self.is_mine:
            if self.values is None:
                self.values = torch.empty(self.shape, dtype=self.dtype, device=full.device)
            self.values.copy_(full)


class AtOwner(Tensor):
    """This rank's part of a gradient that lies whole at its owner: without values.

    Multiplying it by a number, dividing it, or filling it with zeros does so at the owner. Nothing else can be done.
    """

    whole: Whole
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, whole: Whole, part: Tensor) -> AtOwner:
        """In place of ``part``."""
        made: AtOwner = Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype, device=part.device)
        made.whole = whole
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AtOwner({self.whole.name!r}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args[0]
        if func is _aten.detach.default and isinstance(given, AtOwner):
            return AtOwner(given.whole, given)
        if func is _aten.add_.Tensor and isinstance(given, AtOwner) and given.whole.is_arriving:
            return given  # the engine accumulates, and so has the owner
        if func in _SCALING and not any(isinstance(one, AtOwner) for one in args[1:]):
            act = _SCALING[func]
            for one in given if isinstance(given, list | tuple) else (given,):
                real = one.whole.gradient if isinstance(one, AtOwner) else one
                if real is not None:
                    act(real, *args[1:])
            return None if isinstance(given, list | tuple) else given
        raise UnsupportedError(_told(func, args))


def _told(func: Any, args: Sequence[Any]) -> str:
    flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else (arg,))]
    name = next(one.whole.name for one in flat if isinstance(one, AtOwner))
    return (
        f"{func._schema.name.split('::')[1]} was called on the gradient of {name!r}, and no rank has its part of it: "
        "with reduce_to_owner=True it lies whole at its owner. Clip by optimizer.clip_grad_norm_(max_norm), on all "
        "ranks; scale it in place by a number; accumulate under DDP inside no_sync(), but for the last backward pass, "
        "and clear gradients by zero_grad(), not by zero_grad(set_to_none=False); or build with reduce_to_owner=False "
        "to read gradients."
    )


def _sample(part: Tensor) -> Tensor:
    flat = part.view(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)]


def weights_changed(placed: Sequence[PlacedParameter]) -> bool:
    """Whether this rank's part of a parameter is another than its owner has taken. Local; waits for an accelerator.

    What torch counts is seen by its count; what is written through ``.data`` by a few elements of each part.
    """
    taken = [(one.local(), whole.mark) for one, whole in _wholes(placed) if whole.mark is not None]
    if any(part._version != version for part, (version, _) in taken):
        return True
    for dtype in {part.dtype for part, _ in taken}:
        members = [(_sample(part), sample) for part, (_, sample) in taken if part.dtype == dtype]
        now, then = (torch.cat(samples) for samples in zip(*members, strict=True))
        if not torch.equal(now, then):
            return True
    return False


def forget_weights(placed: Sequence[PlacedParameter]) -> None:
    """Let parameters travel in this step, on all ranks: those that owners have are old."""
    for _, whole in _wholes(placed):
        whole.mark = None


def _wholes(placed: Sequence[PlacedParameter]) -> Iterator[tuple[PlacedParameter, Whole]]:
    for one in placed:
        gradient = one.local_gradient()
        if isinstance(gradient, AtOwner):
            yield one, gradient.whole


def there_and_parts(gradients: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Whole gradients that this rank has as their owner, and parts of those that have to travel."""
    there = {index: one.whole.gradient for index, one in gradients.items() if isinstance(one, AtOwner)}
    parts = {index: one for index, one in gradients.items() if index not in there}
    return {index: one for index, one in there.items() if one is not None}, parts


def bring(
    part_of: Callable[[Sequence[int]], tuple[Bucket, Route]],
    gradients: Mapping[int, Tensor],
    parameters: Mapping[int, Tensor],
    process_group: dist.ProcessGroup | None,
    room: Room,
) -> Task[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Whole gradients and parameters at their owners: what lies there already stays, the rest travels. Collective.

    Args:
        part_of: These tensors of the round, and their route.
        gradients: This rank's part of each gradient of the round, or an ``AtOwner``.
        parameters: This rank's part of each parameter.
        process_group: The ranks of the plan.
        room: Memory for what travels.

    Returns:
        Gradients and parameters that this rank owns.
    """
    found = {index: gradients[index].whole for index in parameters if isinstance(gradients[index], AtOwner)}  # type: ignore[attr-defined]
    stored = [index for index in parameters if index not in found]
    pulled = [index for index, whole in found.items() if whole.mark is None]
    full_gradients, full = {}, {}
    if stored:
        bucket, route = part_of(stored)
        fields = [gradients, parameters]
        full_gradients, full = yield from gather_to_owner(bucket, fields, route, process_group, room)
    if pulled:
        bucket, route = part_of(pulled)
        (more,) = yield from gather_to_owner(bucket, [parameters], route, process_group, room)
        full |= more
    if not stored and not pulled:
        yield
    mine = {index: whole for index, whole in found.items() if whole.is_mine}
    full_gradients |= {index: whole.gradient for index, whole in mine.items() if whole.gradient is not None}
    taken = {index: whole for index, whole in mine.items() if whole.mark is not None}
    return full_gradients, full | {index: whole.values for index, whole in taken.items() if whole.values is not None}
