"""DistributedDataParallel's buckets go to owners: each gradient is summed where it is stepped, and nowhere else.

It takes half the bytes of an all-reduce; the updated parameters take the other half, after the step. Its communication
hook is DDP's own interface for this; what it leaves on other ranks is no gradient, and is replaced when DDP has ended.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dist_optim.inside_backward.messages import mean_of, send
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.stepping.at_owner import AtOwner, Whole
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["BucketsToOwners", "hook_of", "send_buckets_to_owners"]


def send_buckets_to_owners(
    optimizer: DistributedOptimizer, ddp: DistributedDataParallel, wholes: Mapping[int, Whole]
) -> str:
    """Let the wrapper's hook send gradients to owners. Local; on all ranks alike.

    Returns:
        Why it cannot; empty where it can.
    """
    hook = hook_of(ddp)
    if hook is None:
        if dist.get_process_group_ranks(ddp.process_group) != dist.get_process_group_ranks(
            optimizer.holdings.process_group or dist.group.WORLD
        ):
            return "DistributedDataParallel reduces over another process group"
        if getattr(ddp, "_comm_hooks", None):
            return "DistributedDataParallel has a communication hook of yours"
        if getattr(ddp, "mixed_precision", None) is not None:
            return "DistributedDataParallel casts gradients itself (mixed_precision)"
        hook = BucketsToOwners()
        _hooks[ddp] = hook
        ddp.register_comm_hook(hook, _call)
    hook.serve(optimizer, wholes)
    return ""


class BucketsToOwners:
    """The hook: it serves the last optimizer that asked for it, and all-reduces once that is gone.

    A copy of a wrapper, or a pickled one, has no hook in its reducer: what it lists there serves nobody.
    """

    def __init__(self) -> None:
        self._optimizer: weakref.ref[DistributedOptimizer] | None = None
        self._wholes: Mapping[int, Whole] = {}
        self._rooms: dict[tuple[int, str], Tensor] = {}
        self._sent: list[tuple[nn.Parameter, Whole]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketsToOwners, ()

    def serve(self, optimizer: DistributedOptimizer, wholes: Mapping[int, Whole]) -> None:
        """Send to this optimizer's owners from now on."""
        self._optimizer, self._wholes = weakref.ref(optimizer), wholes
        self._group = group = optimizer.holdings.process_group or dist.group.WORLD
        self._rank, self._num_ranks = own_rank(group), num_ranks(group)

    def stop(self) -> None:
        """All-reduce from now on."""
        self._optimizer, self._rooms = None, {}

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """One bucket, when backward has filled it. Collective."""
        parameters = bucket.parameters()
        found = [self._wholes.get(id(one)) for one in parameters]
        is_served = self._optimizer is not None and self._optimizer() is not None
        wholes = [whole for whole in found if whole is not None]
        if not is_served or len(wholes) < len(parameters):
            return _all_reduced(bucket, self._group, self._num_ranks)
        if not self._sent:
            Variable._execution_engine.queue_callback(self._after_ddp)
        self._sent += [(one, whole) for one, whole in zip(parameters, wholes, strict=True)]  # type: ignore[misc]
        return self._to_owners(bucket, wholes)

    def _to_owners(self, bucket: dist.GradBucket, wholes: Sequence[Whole]) -> Future[Tensor]:
        flat, parts = bucket.buffer(), bucket.gradients()
        by_owner: list[list[Tensor]] = [[] for _ in range(self._num_ranks)]
        for whole, part in zip(wholes, parts, strict=True):
            by_owner[whole.owner].append(part)
        kept = partial(self._room, bucket.index(), flat)
        work, arrived = send(by_owner, self._rank, self._group, kept, async_op=True)

        def summed(_: object) -> Tensor:
            for parts in arrived():
                own = parts[self._rank]
                total = mean_of(parts, own if self._rank < 2 else None)
                if total is not own:
                    own.copy_(total)
            return flat

        future: Future[Tensor] = work.get_future().then(summed)
        return future

    def _room(self, bucket: int, like: Tensor, name: str, numel: int) -> Tensor:
        """Memory for a bucket's messages: kept on the host, where new memory costs more than what it is for."""
        if like.device.type != "cpu":
            return like.new_empty(numel)
        kept = self._rooms.get((bucket, name))
        if kept is None or kept.numel() != numel or kept.dtype != like.dtype:
            kept = self._rooms[bucket, name] = like.new_empty(numel)
        return kept

    def _after_ddp(self) -> None:
        Variable._execution_engine.queue_callback(self._replace)  # DDP's own callback comes before

    def _replace(self) -> None:
        """After backward: gradients are where they are stepped, and nowhere else."""
        sent, self._sent = self._sent, []
        for parameter, whole in sent:
            if parameter.grad is not None:
                whole.gradient = parameter.grad if whole.is_mine else None
                parameter.grad = AtOwner(whole, parameter)


_hooks: weakref.WeakKeyDictionary[DistributedDataParallel, BucketsToOwners] = weakref.WeakKeyDictionary()
"""A wrapper keeps its hook for good."""


def hook_of(model: nn.Module) -> BucketsToOwners | None:
    """The hook of a DistributedDataParallel wrapper that sends gradients to owners, or has done so."""
    return _hooks.get(model) if isinstance(model, DistributedDataParallel) else None


def _call(hook: Any, bucket: Any) -> Any:
    return hook.reduce(bucket)


_call.__annotations__.clear()  # DDP compares them with types, and these are their names


def _all_reduced(bucket: dist.GradBucket, group: Any, num_ranks: int) -> Future[Tensor]:
    """What DDP does without a hook."""
    flat = bucket.buffer().div_(num_ranks)
    future: Future[Tensor] = (
        dist.all_reduce(flat, group=group, async_op=True).get_future().then(lambda done: done.value()[0])
    )
    return future
