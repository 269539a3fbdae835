"""DistributedDataParallel without its gradient buckets: gradients are reduced in small buckets that come and go.

DDP's own reducer keeps buckets for all gradients for the life of the model. It is retired here; DDP goes on
broadcasting buffers and moving inputs.

Buckets are filled and reduced in an order that is equal on all ranks: the model's parameters in reverse, and from the
second step on the order in which gradients came to rank 0 in the first. A parameter that has no gradient on this rank
holds its bucket open until ``flush``, and is zero there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import UnsupportedError, WrongModeError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.overrides import check
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.parameter_guard import NO_JOIN

__all__ = ["BucketReduction", "retire_reducer", "why_not_this_ddp"]


class BucketReduction:
    """Averages gradients over the ranks, a bucket at a time, and hands them on.

    Args:
        placed: All parameters of the optimizer.
        indices: Positions of those that are trained.
        process_group: DDP's ranks.
        bucket_bytes: Bytes of gradients that are reduced together; a larger gradient has a bucket of its own.
        deliver: Gets the averaged gradients of a bucket, by position; only those that some rank had.
    """

    def __init__(
        self,
        placed: Sequence[PlacedParameter],
        indices: Sequence[int],
        process_group: dist.ProcessGroup | None,
        bucket_bytes: int,
        deliver: Callable[[Mapping[int, Tensor]], None],
    ) -> None:
        self._placed = placed
        self._group = process_group
        self._world_size = num_ranks(process_group)
        self._bucket_bytes = bucket_bytes
        self._deliver = deliver
        self._came: dict[int, None] = {}  # in order; a step that measures norms meets each twice
        self._is_order_known = False
        # What is frozen for now comes last: it would hold up the buckets after it.
        order = sorted(indices, key=lambda index: (not placed[index].is_idle, placed[index].position), reverse=True)
        self._make_buckets(order)

    def _make_buckets(self, order: Sequence[int]) -> None:
        """Cut the order into buckets of one dtype and device; a bucket's turn comes when its last member was met."""
        self._order = list(order)
        self._buckets: list[list[int]] = []
        filling: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
        for index in order:
            one = self._placed[index]
            bucket = filling[one.dtype, one.device]
            if bucket and self._nbytes(bucket) + self._nbytes([index]) > self._bucket_bytes:
                self._buckets.append(list(bucket))
                bucket.clear()
            bucket.append(index)
        self._buckets += [bucket for bucket in filling.values() if bucket]
        self._bucket_of = {index: number for number, bucket in enumerate(self._buckets) for index in bucket}
        self._offsets = {
            index: sum(self._placed[other].shape.numel() for other in bucket[:at])
            for bucket in self._buckets
            for at, index in enumerate(bucket)
        }
        self._restart()

    def _nbytes(self, indices: Sequence[int]) -> int:
        return sum(self._placed[index].shape.numel() * self._placed[index].dtype.itemsize for index in indices)

    def _restart(self) -> None:
        self._next = 0  # the bucket whose turn it is
        self._flats: dict[int, Tensor] = {}
        self._filled: dict[int, set[int]] = defaultdict(set)
        self._in_flight: tuple[int, Tensor, dist.Work] | None = None

    def ready(self, index: int, gradient: Tensor) -> None:
        """Take a gradient of this rank. Buckets that are full, and whose turn it is, are reduced. Collective."""
        number = self._bucket_of[index]
        if number not in self._flats:
            self._land()  # before memory is taken for the next bucket
            self._flats[number] = self._empty(number)
        at = self._offsets[index]
        self._flats[number][at : at + gradient.numel()].copy_(gradient.reshape(-1))
        self._filled[number].add(index)
        if not self._is_order_known:
            self._came[index] = None
        while self._next < len(self._buckets) and len(self._filled[self._next]) == len(self._buckets[self._next]):
            self._launch()

    def flush(self) -> None:
        """Reduce what is left: buckets with a parameter that got no gradient on this rank. Collective."""
        while self._next < len(self._buckets):
            self._launch()
        self._land()
        self._restart()

    def forget(self) -> None:
        """Drop the gradients of a backward pass that ended early, on all ranks."""
        if self._in_flight is not None:
            self._in_flight[2].wait()
        self._came = {}
        self._restart()

    def held_bytes(self) -> int:
        """Bytes of the buckets that exist now."""
        flying = [self._in_flight[1]] if self._in_flight is not None else []
        return sum(flat.nbytes for flat in [*self._flats.values(), *flying])

    def learn_order(self) -> None:
        """After the first step: take the order in which gradients came to rank 0. Collective."""
        if self._is_order_known:
            return
        order = [*self._came, *(index for index in self._order if index not in self._came)]
        mine = torch.tensor(order, device=self._placed[0].device)
        dist.broadcast(mine, group=self._group, group_src=0)
        self._is_order_known = True
        self._came = {}
        self._make_buckets(mine.tolist())

    def _empty(self, number: int) -> Tensor:
        """A flat bucket of zeros; one more element a parameter says on how many ranks it has a gradient."""
        bucket, first = self._buckets[number], self._placed[self._buckets[number][0]]
        numel = sum(self._placed[index].shape.numel() for index in bucket)
        return torch.zeros(numel + len(bucket), dtype=first.dtype, device=first.device)

    def _launch(self) -> None:
        self._land()
        number, self._next = self._next, self._next + 1
        flat = self._flats.pop(number) if number in self._flats else self._empty(number)
        bucket = self._buckets[number]
        marks = flat[-len(bucket) :]
        if len(self._filled[number]) == len(bucket):
            marks.fill_(1)  # on the device: a copy from the host would wait for it
        else:
            own = torch.tensor([float(index in self._filled[number]) for index in bucket], device="cpu")
            marks.copy_(own, non_blocking=True)  # CUDA takes a copy of such memory before it returns
        flat.div_(self._world_size)
        self._in_flight = (number, flat, dist.all_reduce(flat, group=self._group, async_op=True))

    def _land(self) -> None:
        """Wait for the bucket in flight, and hand it on."""
        if self._in_flight is None:
            return
        number, flat, work = self._in_flight
        self._in_flight = None
        work.wait()
        bucket, filled = self._buckets[number], self._filled.pop(number)
        present = [True] * len(bucket)
        if len(filled) < len(bucket):  # only then the marks are news, and worth the wait for them
            present = [mark > 0 for mark in flat[-len(bucket) :].tolist()]
        gradients = {}
        for index, is_present in zip(bucket, present, strict=True):
            if is_present:
                at, shape = self._offsets[index], self._placed[index].shape
                gradients[index] = flat[at : at + shape.numel()].view(shape)
        if gradients:
            self._deliver(gradients)


class _RetiredReducer:
    """In the place of DDP's reducer: it lets DDP's forward pass go on, and reduces nothing."""

    is_removed = False

    def prepare_for_forward(self) -> None:
        if self.is_removed:
            raise WrongModeError(
                "The fused backward that reduced this model's gradients was removed. Wrap the module anew: "
                "DistributedDataParallel(ddp.module, ...)."
            )

    def prepare_for_backward(self, outputs: object) -> None:
        pass

    def _rebuild_buckets(self) -> bool:
        return False


class _RetiredLogger:
    def set_runtime_stats_and_log(self) -> None:
        pass

    def set_error_and_log(self, message: str) -> None:
        pass

    def _set_uneven_input_join(self) -> NoReturn:
        """Called by DDP's ``join_hook``, before ranks part."""
        raise UnsupportedError(f"Join was given a model that is updated inside backward. {NO_JOIN}")


def why_not_this_ddp(ddp: DistributedDataParallel, process_group: dist.ProcessGroup | None) -> str:
    """Why this wrapper's reduction cannot be replaced, and what to do; empty where it can."""
    check("DDP")
    own = dist.get_process_group_ranks(ddp.process_group)
    if own != dist.get_process_group_ranks(process_group or dist.group.WORLD):
        return f"DistributedDataParallel reduces over the ranks {own}. Pass its process_group to build_optimizer."
    if getattr(ddp, "mixed_precision", None) is not None:
        return "DistributedDataParallel casts parameters itself (mixed_precision). Use autocast in its place."
    if getattr(ddp, "_comm_hooks", None):
        return "DistributedDataParallel has a communication hook, which would not run. Leave the hook out."
    return ""


def retire_reducer(ddp: DistributedDataParallel) -> Callable[[], None]:
    """Free DDP's reducer with its buckets and hooks, and refuse ``no_sync``.

    Returns:
        What to call when nobody reduces any longer: the next forward pass that trains is then refused.
    """
    anyway: Any = ddp
    retired = _RetiredReducer()
    # Both hold the reducer; it unregisters its hooks and frees its buckets when it goes.
    anyway.reducer, anyway.logger = retired, _RetiredLogger()
    # What these need the reducer for is done here without them.
    anyway.find_unused_parameters = anyway.static_graph = False
    anyway.no_sync = _refuse_no_sync

    def remove() -> None:
        retired.is_removed = True

    return remove


def _refuse_no_sync() -> NoReturn:
    raise UnsupportedError(
        "no_sync() accumulates gradients, but this model's are applied and freed inside backward. Use larger batches, "
        "or build the optimizer with fused_backward=False."
    )
