"""What a step does, counted in steps of their own that are not timed: collectives, bytes, waits, allocations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["Counts", "Traffic", "allocations_of", "counts_of", "traffic_counted"]


NO_COLLECTIVES = ("_wrap_tensor_autograd", "barrier", "monitored_barrier_")
"""Of torch's namespaces for them: what moves no data."""


@dataclass(slots=True)
class Traffic:
    """Of one rank. Bytes are those that it sends if rings carry the collectives."""

    collectives: Counter[str] = field(default_factory=Counter)
    sent_bytes: float = 0.0
    waits: int = 0
    """Calls that wait for a collective."""
    reads: int = 0
    """Values that Python reads from tensors: on an accelerator the host waits for each."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one rank, in one steady step."""

    collectives: dict[str, int]
    sent_bytes: int
    waits: int
    reads: int
    allocations: int
    allocated_bytes: int


class _Watch(TorchDispatchMode):
    """Sees every collective, whoever starts it: torch.distributed, DTensor, DeepSpeed."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # its own dispatch comes first; what it calls is seen here
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in NO_COLLECTIVES:
            self._note(name, args)
        self.traffic.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        if name == "wait_tensor":
            self.traffic.waits += 1
            return
        kind = name.strip("_").removesuffix("_coalesced")
        self.traffic.collectives[kind] += 1
        self.traffic.sent_bytes += sent_bytes(kind, args)


def sent_bytes(kind: str, args: Any) -> float:
    """What this rank sends in a ring: of an all-to-all what it has for others, of the rest an even share."""
    others = (num_ranks() - 1) / num_ranks()
    if kind.startswith("alltoall_base"):
        sizes = args[4] or [args[1].shape[0] / num_ranks()] * num_ranks()
        return nbytes(args[1]) * (1 - sizes[own_rank()] / max(sum(sizes), 1))
    if kind.startswith(("alltoall", "all_to_all")):
        return nbytes(args[1] if kind == "alltoall" else args[0]) * others
    if kind.startswith(("allgather", "all_gather")):
        # c10d's take what is written first, and then what is sent; the functional ones what is sent.
        return nbytes(args[1] if kind.startswith("allgather") else args[0]) * (num_ranks() - 1)
    if kind.startswith(("allreduce", "all_reduce")):
        return 2 * nbytes(args[0]) * others
    if kind.startswith("reduce_scatter"):
        return nbytes(args[1] if isinstance(args[1], (Tensor, list)) else args[0]) * others
    return nbytes(args[0]) * others


def nbytes(value: Any) -> int:
    """Of a tensor, or of all tensors of a list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


@contextmanager
def traffic_counted() -> Iterator[Traffic]:
    """Count what this rank does inside the block."""
    traffic, wait = Traffic(), dist.Work.wait

    def counting(work: Any, *args: Any, **options: Any) -> Any:
        traffic.waits += 1
        return wait(work, *args, **options)

    with mock.patch.object(dist.Work, "wait", counting), _Watch(traffic):
        yield traffic


def allocations_of(act: Callable[[], None]) -> list[int]:
    """Bytes of each tensor memory that torch took during the act, on any device."""
    from torch.profiler import ProfilerActivity, profile

    with unheard(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        act()
    events = profiled.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@contextmanager
def unheard() -> Iterator[None]:
    """Without standard error, where torch's profiler tells from C++ when it starts and ends."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def counts_of(prepare: Callable[[], None], step: Callable[[], None]) -> Counts:
    """Take two steps, and count."""
    prepare()
    with traffic_counted() as traffic:
        step()
    prepare()
    taken = allocations_of(step)
    return Counts(
        dict(traffic.collectives), round(traffic.sent_bytes), traffic.waits, traffic.reads, len(taken), sum(taken)
    )
