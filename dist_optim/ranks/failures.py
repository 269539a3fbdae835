"""A failure of upstream's step on one rank, told to all: nobody waits for a rank that has left."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dist_optim.errors import StepFailedError
from dist_optim.ranks.agreement import num_ranks, own_rank

__all__ = ["FailureNotice"]


class FailureNotice:
    """Collects upstream's error of a step; after the exchange, the rank raises it and the others learn of it.

    The others read the notice at their next step, so that it costs no wait in this one.
    """

    def __init__(self, device: torch.device, process_group: dist.ProcessGroup | None) -> None:
        self._device = device
        self._group = process_group
        self._error: Exception | None = None
        self._failed_rank: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def note(self, error: Exception) -> None:
        """Remember an error until the exchange that other ranks wait for is done."""
        self._error = error

    def send(self) -> None:
        """At the end of a step. Collective. Raises the noted error, after all ranks were told."""
        if num_ranks(self._group) > 1:
            failed = 0 if self._error is None else own_rank(self._group) + 1
            self._failed_rank = torch.tensor([failed], device=self._device)
            self._work = dist.all_reduce(self._failed_rank, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self._error is not None:
            if self._work is not None:
                self._work.wait()
            raise self._error

    def receive(self, optimizer_name: str, num_steps: int) -> None:
        """At the start of the next step.

        Raises:
            StepFailedError: The step before failed on another rank.
        """
        if self._work is None or self._failed_rank is None:
            return
        self._work.wait()
        failed = int(self._failed_rank) - 1
        if failed >= 0:
            raise StepFailedError(
                f"{optimizer_name}: upstream's step failed on rank {failed} in step {num_steps}; that rank's own error "
                "says why. Parameters are partly updated: resume from the last checkpoint."
            )
