"""DDP gradients reduced to their owners only: with the updated parameters' way back, the traffic of one all-reduce.

A DDP communication hook sends each gradient of a bucket to the rank that owns the parameter, and adds the parts there
in rank order. What is left in ``grad`` at all other ranks is NaN, so that whatever reads it by mistake is noticed.
"""

# No postponed annotations here: DDP reads those of its hook, and wants the types themselves.
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import UnsupportedError
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.ranks.fingerprints import fingerprint

__all__ = ["OwnerReduction", "find_ddp"]


def find_ddp(model: nn.Module) -> DistributedDataParallel:
    """The DDP wrapper of the model.

    Raises:
        UnsupportedError: There is none.
    """
    if isinstance(model, DistributedDataParallel):
        return model
    raise UnsupportedError(
        "reduce_to_owner=True needs a model wrapped in DistributedDataParallel, whose gradient reduction it replaces; "
        f"this is a {type(model).__name__}. Wrap the model first, or leave reduce_to_owner out."
    )


class OwnerReduction:
    """The hook, and a record of what it delivered.

    Args:
        ddp: The wrapped model; it must not have a communication hook yet.
        owners: Owner's rank by ``id(parameter)``; parameters that are not optimized go nowhere.
        process_group: The ranks of the plan, which must be DDP's.
    """

    def __init__(
        self, ddp: DistributedDataParallel, owners: Mapping[int, int], process_group: dist.ProcessGroup | None
    ) -> None:
        self._owners = dict(owners)
        self._group = process_group
        self._rank, self._world_size = own_rank(process_group), num_ranks(process_group)
        self._delivered: dict[int, tuple[Tensor, int]] = {}
        ddp.register_comm_hook(None, self._hook)

    def _hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        parameters, gradients = bucket.parameters(), bucket.gradients()
        at_owner: list[list[int]] = [[] for _ in range(self._world_size)]
        for index, parameter in enumerate(parameters):
            if id(parameter) in self._owners:
                at_owner[self._owners[id(parameter)]].append(index)
        sizes = [sum(gradients[index].numel() for index in indices) for indices in at_owner]
        buffer = bucket.buffer()
        parts = [gradients[index].reshape(-1) for indices in at_owner for index in indices]
        send = torch.cat(parts) if parts else buffer.new_empty(0)
        own = sizes[self._rank]
        received = buffer.new_empty(own * self._world_size)
        work = dist.all_to_all_single(received, send, [own] * self._world_size, sizes, group=self._group, async_op=True)

        def deliver(_: object, keep: Tensor = send) -> Tensor:
            total = received[:own]
            for rank in range(1, self._world_size):
                total.add_(received[rank * own : (rank + 1) * own])
            total.div_(self._world_size)
            buffer.fill_(torch.nan)
            at = 0
            for index in at_owner[self._rank]:
                gradient = gradients[index]
                gradient.copy_(total[at : at + gradient.numel()].view(gradient.shape))
                self._delivered[id(parameters[index])] = (parameters[index], fingerprint(gradient))
                at += gradient.numel()
            return buffer

        return work.get_future().then(deliver)

    def were_changed(self) -> bool:
        """Whether somebody changed a delivered gradient since, as ``torch.nn.utils.clip_grad_norm_`` does."""
        return any(
            parameter.grad is not None and fingerprint(parameter.grad) != mark
            for parameter, mark in self._delivered.values()
        )

    def accept_changes(self) -> None:
        """Take the gradients as they are now: after a change that knows of owners."""
        self._delivered = {
            key: (parameter, fingerprint(parameter.grad))
            for key, (parameter, _) in self._delivered.items()
            if parameter.grad is not None
        }
