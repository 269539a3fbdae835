"""Where updates inside backward are right, and what would undo them without a word."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from dist_optim.errors import UnsupportedError
from dist_optim.inside_backward.ddp import why_not_this_ddp
from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.ranks.agreement import num_ranks
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping.optimizer import InsideBackward

__all__ = ["NOT_UNDER_FSDP1", "guard_clipping", "mark", "marked_by", "unmark", "why_not_fused"]

NOT_UNDER_FSDP1 = "FSDP1 reduces one flat gradient for a whole unit. Use fsdp_version: 2 (fully_shard)."
_GUARDED = "_dist_optim_guarded"
_updated_by = WeakTensorKeyDictionary()
"""By parameter that is updated inside backward, a weak reference to what does it: no attribute, which pickle takes."""


def why_not_fused(
    model: nn.Module,
    spec: OptimizerSpec,
    placed: Mapping[str, PlacedParameter],
    process_group: dist.ProcessGroup | None,
) -> str:
    """Why updates cannot be made inside backward here, and what to do; empty where they can."""
    if Trait.FUSED_BACKWARD not in spec.traits and Trait.ELEMENTWISE not in spec.traits:
        return (
            "only elementwise optimizers and those made for it are stepped inside backward. Leave fused_backward out."
        )
    trained = [one for one in placed.values() if one.is_trained]
    if any(one.dtype is torch.float16 for one in trained):
        return (
            "fp16 gradients need loss scaling, and an overflow is known only when updates are made. Use bfloat16 or "
            "fp32 parameters."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return NOT_UNDER_FSDP1
    leave = "" if spec.instead else ", or leave fused_backward out"
    if num_ranks(process_group) == 1:
        return ""
    if isinstance(model, DistributedDataParallel):
        return why_not_this_ddp(model, process_group)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        plain = next((one.fqn for one in trained if not isinstance(one.parameter, DTensor)), None)
        if plain is not None:
            return f"{plain!r} is not sharded, so that nothing reduces its gradient in backward. Shard the whole model."
        # Inside backward each replica steps all, so that its shards alone count.
        is_boxed = any(isinstance(one.layout, BoxShard) for one in trained)
        apart = detect(model, process_group, shares_replicas=False) if is_boxed else {}
        if any(isinstance(one.layout, BoxShard) for one in apart.values()):
            return f"the model is sharded over several mesh axes. Shard it over one{leave}."
        return ""
    if any(isinstance(one.parameter, DTensor) for one in trained):
        return f"the model is sharded, and not by fully_shard, which reduces gradients. Shard it by that{leave}."
    return (
        "nothing reduces this model's gradients inside backward. Wrap it in DistributedDataParallel, or shard it with "
        "fully_shard."
    )


def marked_by(parameter: Tensor) -> InsideBackward | None:
    """What updates this parameter inside backward, if anything does."""
    found: InsideBackward | None = _updated_by.get(parameter, lambda: None)()
    return found


def mark(parameter: Tensor, by: InsideBackward) -> None:
    """Note that this parameter is updated inside backward from now on."""
    _updated_by[parameter] = weakref.ref(by)


def unmark(parameter: Tensor) -> None:
    """Note that it is not any longer."""
    _updated_by.pop(parameter, None)


def guard_clipping() -> None:
    """Let torch's clipping functions raise for parameters that are updated inside backward. Once in a process.

    They would find no gradients, return a norm of zero, and leave the user with unclipped training. The guard stands
    inside torch's own functions, so that who has imported them before meets it too; for all other parameters nothing
    changes.
    """
    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"):
        outer: Any = getattr(torch.nn.utils, name)
        cells = dict(zip(outer.__code__.co_freevars, outer.__closure__ or (), strict=True))
        inside = cells.get("func")  # torch wraps what clips to be free of autograd
        original = outer if inside is None else inside.cell_contents
        if hasattr(original, _GUARDED):
            continue
        guarded = _guarded(original)
        setattr(guarded, _GUARDED, True)
        if inside is None:
            setattr(torch.nn.utils, name, guarded)
        else:
            inside.cell_contents = guarded


def _guarded(clip: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(clip)
    def clip_or_refuse(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for parameter in given:
            fused = marked_by(parameter)
            if fused is not None:
                raise UnsupportedError(fused.why_no_clipping())
        return clip(given, *args, **kwargs)

    return clip_or_refuse
