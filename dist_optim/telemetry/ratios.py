"""The norm of an update over the norm of the weights, of each param group: of whole tensors, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.division import is_half
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["WeightsBefore"]


class WeightsBefore:
    """Copies of this rank's weights, kept during one step.

    Args:
        parts: The optimizers underneath, with the weights as they are in the model now.
    """

    def __init__(self, parts: Sequence[DistributedOptimizer]) -> None:
        self._parts = parts
        self._copies = [{index: _copy(weight) for index, weight in _weights(part)} for part in parts]

    def update_ratios(self) -> list[float]:
        """By group; 0.0 where a group has no weights. Once: the copies are used up. Collective on several ranks."""
        held = self._parts[0].holdings
        sums: dict[int, Tensor] = {}
        groups = {id(part.holdings.process_group): part.holdings.process_group for part in self._parts}
        for part, copies in zip(self._parts, self._copies, strict=True):
            empty = torch.zeros(2, len(held.groups), dtype=torch.float64, device=held.placed[0].device)
            _add(part, copies, sums.setdefault(id(part.holdings.process_group), empty))
        for key, group in groups.items():
            if num_ranks(group) > 1:
                dist.all_reduce(sums[key], group=group)
        moved, size = torch.stack(list(sums.values())).sum(0).sqrt().tolist()
        return [up / down if down else 0.0 for up, down in zip(moved, size, strict=True)]


def _copy(weight: Tensor) -> Tensor:
    """In which differences are exact enough: half-precision ones in single precision."""
    return weight.detach().to(torch.float32 if is_half(weight.dtype) else weight.dtype, copy=True)


def _weights(part: DistributedOptimizer) -> Iterator[tuple[int, Tensor]]:
    """This rank's part of what is trained; of replicated tensors the first rank's alone."""
    held = part.holdings
    for index in held.trained:
        one = held.placed[index]
        if not isinstance(one.layout, Elsewhere) and (not one.layout.is_replicated or held.rank == 0):
            yield index, one.local()


def _add(part: DistributedOptimizer, copies: dict[int, Tensor], sums: Tensor) -> None:
    """Add squares: of updates to the first row, of weights to the second. A few launches, whatever their number."""
    if not copies:
        return
    held = part.holdings
    group_of = [number for number, members in enumerate(held.members) for _ in members]
    before, now = list(copies.values()), [weight for _, weight in _weights(part)]
    where = torch.tensor([group_of[index] for index in copies], device=sums.device)
    size = torch._foreach_norm(before)
    torch._foreach_sub_(before, now)
    for row, norms in enumerate((torch._foreach_norm(before), size)):
        squares = torch.stack([norm.to(sums.device) for norm in norms]).double().square()
        sums[row].index_add_(0, where, squares)
