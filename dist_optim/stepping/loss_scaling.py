"""torch's GradScaler around a step: which scaler may decide here that a step is left out."""

from __future__ import annotations

from types import FrameType

from torch.amp import GradScaler

from dist_optim.errors import UnsupportedError
from dist_optim.layouts.layout import FlatRange
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.holdings import Holdings

__all__ = ["refuse_local_scaler"]


def refuse_local_scaler(held: Holdings, caller: FrameType | None) -> None:
    """Refuse a plain scaler under FSDP1, whose ranks would skip a step each for itself. Local; alike on all ranks.

    FSDP1 shows each rank a plain tensor of its own part of a gradient, and a plain scaler looks no further: the rank
    with an overflow leaves the step out, and the others wait for it there. DTensors, and DDP's gradients, tell all.

    Args:
        held: What is stepped.
        caller: The frame that asks whether the optimizer scales by itself: ``GradScaler.step``, which has no other way
            to say who it is.

    Raises:
        UnsupportedError: It is a scaler that looks at this rank's gradients alone.
    """
    scaler = None if caller is None else caller.f_locals.get("self")
    if not isinstance(scaler, GradScaler) or type(scaler).unscale_ is not GradScaler.unscale_:
        return
    cut = (one for one in held.placed if one.is_trained and isinstance(one.layout, FlatRange))
    if any(num_ranks(one.process_group) > 1 for one in cut):
        raise UnsupportedError(
            f"{type(scaler).__name__} looks for overflows in this rank's part of the gradients alone, and FSDP1 cuts "
            "them: one rank would skip a step that the others take. No parameter was changed. Use "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler, which asks all ranks; or FSDP2 "
            "(fully_shard), or bfloat16, which needs no scaling."
        )
