"""The sentinel: every so many steps, ranks compare fingerprints of what they should hold alike.

It catches what no single step can: a weight changed on one rank, a rate that drifted, a replica's state gone astray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import RanksDisagreeError
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.ranks.fingerprints import fingerprint
from dist_optim.stepping.presence import hyperparameters_of

if TYPE_CHECKING:
    from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["compare_ranks"]


def compare_ranks(optimizer: DistributedOptimizer, process_group: dist.ProcessGroup | None) -> None:
    """Compare param groups, parameters and optimizer state between all ranks that hold the same of them. Collective.

    Args:
        optimizer: After a step.
        process_group: All ranks that train the model, replicas of shard groups included.

    Raises:
        RanksDisagreeError: On all ranks, naming the first thing that differs, the step, and the ranks.
    """
    holdings: list[Mapping[str, Any]] = gather_objects(_holdings(optimizer), process_group)
    first_holder: dict[str, int] = {}
    for rank, held in enumerate(holdings):
        for name, value in held.items():
            other = first_holder.setdefault(name, rank)
            if holdings[other][name] != value:
                raise RanksDisagreeError(
                    f"After step {optimizer.num_steps}, {name} is {holdings[other][name]} on rank {other} and {value} "
                    f"on rank {rank}. Something changed it on one rank only (code that runs on one rank, a local "
                    "metric, faulty memory). Resume from a checkpoint, and look for what treats ranks differently."
                )


def _holdings(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """Name to value or fingerprint; a name says which part it is of, so that only equal parts are compared."""
    keys = {key for group in optimizer.param_groups for key in group} - {"params"}
    held = dict(hyperparameters_of(optimizer.param_groups, keys))
    part = own_rank(optimizer.process_group)
    names = optimizer.parameter_names()
    for placed in optimizer.placed_parameters():
        where = "" if placed.layout.is_replicated else f", slice {part}"
        held[f"parameter {placed.fqn!r}{where} (fingerprint)"] = fingerprint(placed.local())
    for instance, index in optimizer.stepped_here():
        where = "" if index in optimizer.plan.owners else f", slice {part}"
        for key, value in instance.encoded_state(index).items():
            shown = fingerprint(value) if isinstance(value, Tensor) else value
            held[f"state {key!r} of {names[index]!r}{where}"] = shown
    return held
