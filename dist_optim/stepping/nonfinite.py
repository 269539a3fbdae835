"""``on_nonfinite``: gradients that are infinite or not a number, found before a step, and what is done about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import HyperparameterError, NonFiniteGradientError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.stepping.at_owner import AtOwner

__all__ = ["CHOICES", "check_choice", "first_nonfinite", "log_skip", "nonfinite_error"]

CHOICES = ("raise", "skip")
logger = logging.getLogger("dist_optim")


def check_choice(on_nonfinite: str | None) -> None:
    """Refuse a value that is no choice.

    Raises:
        HyperparameterError: It is neither None nor one of ``CHOICES``.
    """
    if on_nonfinite is not None and on_nonfinite not in CHOICES:
        raise HyperparameterError(
            f"on_nonfinite is {on_nonfinite!r}. Give 'raise' (all ranks raise in that step, and nothing is changed), "
            "'skip' (no rank takes that step), or None (gradients are not looked at)."
        )


@torch.no_grad()
def first_nonfinite(placed: Sequence[PlacedParameter]) -> str | None:
    """The first parameter whose gradient is not finite here; None where all are. Local; waits for the gradients.

    The largest magnitude of each gradient is infinite or NaN exactly where one of its elements is; a sum of squares
    would overflow on large ones. One fused operation for each device and dtype, and one read of the host.
    """
    found: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for at, one in enumerate(placed):
        gradient = one.local_gradient()
        if isinstance(gradient, AtOwner):
            gradient = gradient.whole.gradient
        if gradient is not None and gradient.numel():
            found.setdefault((gradient.device, gradient.dtype), []).append((at, gradient))
    bad = [at for members in found.values() for at in _nonfinite_of(members)]
    return placed[min(bad)].fqn if bad else None


def _nonfinite_of(members: Sequence[tuple[int, Tensor]]) -> list[int]:
    largest = torch._foreach_norm([gradient for _, gradient in members], torch.inf)
    are_finite = torch.stack(list(largest)).isfinite().tolist()
    return [at for (at, _), is_finite in zip(members, are_finite, strict=True) if not is_finite]


def nonfinite_error(name: str, fqn: str, num_steps: int) -> NonFiniteGradientError:
    """For this parameter of the optimizer ``name``, in the step after ``num_steps``."""
    return NonFiniteGradientError(
        f"{name}: the gradient of {fqn!r} is infinite or not a number in step {num_steps + 1}. No parameter was "
        "changed. Look for what overflowed (a loss of NaN, a rate that is too high, fp16 without loss scaling), or "
        "build with on_nonfinite='skip', which leaves such steps out on all ranks."
    )


def log_skip(name: str, fqn: str | None, num_steps: int, num_skipped: int, ranks: dist.ProcessGroup | None) -> None:
    """Say on rank 0 that a step was left out, and why. Collective.

    Args:
        name: Of the optimizer.
        fqn: The parameter whose gradient is not finite on this rank, if any is.
        num_steps: Steps taken before.
        num_skipped: Steps that were left out, this one among them.
        ranks: All ranks that train the model.
    """
    everyones = gather_objects(fqn, ranks)
    rank, where = next((rank, fqn) for rank, fqn in enumerate(everyones) if fqn is not None)
    if own_rank(ranks) == 0:
        logger.warning(
            "%s: step %d was skipped on all ranks: the gradient of %r is infinite or not a number on rank %d (%d "
            "skipped so far).",
            name,
            num_steps + 1,
            where,
            rank,
            num_skipped,
        )
