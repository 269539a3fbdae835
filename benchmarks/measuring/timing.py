"""Wall time and processor time of steps that are taken in turn: A, B, C, A, B, C, ...

Processor time is that of all threads of the busiest rank. It is what a step costs; wall time on a machine with fewer
cores than ranks is not what it would be elsewhere.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_optim.ranks.agreement import num_ranks
from measuring.contenders import Contender

__all__ = ["Sample", "in_turn", "timed", "without_collector"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one step: wall time of the slowest rank, processor time of the busiest."""

    wall_s: float
    processor_s: float


def timed(act: Callable[[], None], device: torch.device) -> Sample:
    """Let all ranks act together; the same sample on all of them."""
    gc.collect()
    meet()
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    act()
    synchronize(device)
    spent = torch.tensor([time.perf_counter() - wall, time.process_time() - processor], dtype=torch.float64)
    if num_ranks() > 1:
        everyones = spent.to(device)
        dist.all_reduce(everyones, op=dist.ReduceOp.MAX)
        spent = everyones.cpu()
    return Sample(*spent.tolist())


def in_turn(
    contenders: Sequence[Contender], device: torch.device, *, at_least: int, at_most: int, seconds: float
) -> dict[str, list[Sample]]:
    """Samples by contender; the n-th of each is its n-th step, taken beside the others' n-th.

    Args:
        contenders: The same on all ranks.
        device: Where they step.
        at_least: Steps of each, whatever time they take.
        at_most: Steps of each.
        seconds: Of wall time in steps, after which no more are taken.
    """
    samples: dict[str, list[Sample]] = {one.name: [] for one in contenders}
    with without_collector():
        # All ranks have the same samples, and so the same end.
        while len(next(iter(samples.values()))) < at_most and (
            len(next(iter(samples.values()))) < at_least or total(samples) < seconds
        ):
            for one in contenders:
                one.prepare()
                samples[one.name].append(timed(one.step, device))
    return samples


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage is collected between steps (``timed``), not in them; what is there already stays out."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def total(samples: dict[str, list[Sample]]) -> float:
    return sum(one.wall_s for taken in samples.values() for one in taken)


def meet() -> None:
    """Wait for the other ranks."""
    if num_ranks() > 1:
        dist.barrier()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
