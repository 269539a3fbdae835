"""One all-to-all of gradients, and the mean of what it brings: the bytes of a reduce-scatter, to whoever steps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.copies import copy, cut

__all__ = ["mean_of", "send"]


def send(
    pieces: Sequence[Sequence[Tensor]],
    rank: int,
    process_group: dist.ProcessGroup | None,
    take: Callable[[str, int], Tensor],
    async_op: bool = False,
) -> tuple[Any, Callable[[], list[tuple[Tensor, ...]]]]:
    """Send each rank its pieces. Collective.

    Args:
        pieces: Of each rank: what it shall have. All ranks have pieces of the same sizes for it.
        rank: This rank, whose own pieces stay where they are.
        process_group: All ranks that have pieces.
        take: Flat memory, by what it is for (``"sent"`` or ``"received"``) and elements.
        async_op: Return before anything has arrived.

    Returns:
        torch's work, and a function to call when it has ended: of each of this rank's pieces what every rank has of it,
        in the order of ranks.
    """
    mine = pieces[rank]
    sizes = [sum(map(Tensor.numel, parts)) for parts in pieces]
    share, sizes[rank] = sizes[rank], 0
    shares = [0 if other == rank else share for other in range(len(pieces))]
    sent, received = take("sent", sum(sizes)), take("received", sum(shares))
    others = [part for other, parts in enumerate(pieces) if other != rank for part in parts]
    copy(cut(sent, others), others)
    work = dist.all_to_all_single(received, sent, shares, sizes, group=process_group, async_op=async_op)

    def arrived() -> list[tuple[Tensor, ...]]:
        of_ranks = [cut(received.narrow(0, at * share, share), mine) for at in range(len(pieces) - 1)]
        return list(zip(*of_ranks[:rank], mine, *of_ranks[rank:], strict=True))

    return work, arrived


def mean_of(parts: Sequence[Tensor], out: Tensor | None) -> Tensor:
    """The mean over ranks, in their order.

    Args:
        parts: What each rank has sent.
        out: Where it shall be, if it has to be anywhere; may be one of the first two parts.
    """
    first, second, *rest = parts
    total = first + second if out is None else torch.add(first, second, out=out)
    for part in rest:
        total += part
    total /= len(parts)
    return total
