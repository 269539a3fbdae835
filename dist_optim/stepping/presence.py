"""What ranks agree on before every step: which parameters have gradients, that hyperparameters are equal, and, once,
that gradients of replicated parameters really were reduced. One small all-reduce a step.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_optim.errors import ParameterError, RanksDisagreeError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import agree_on_presence, assert_ranks_equal, num_ranks
from dist_optim.ranks.fingerprints import fingerprint
from dist_optim.specs.driver import ParamGroup

__all__ = ["agree_on_gradients", "agree_on_hyperparameters", "assert_gradients_reduced", "hyperparameters_of"]

DIGEST_BITS = 32


def agree_on_gradients(
    placed: Sequence[PlacedParameter],
    trainable: Collection[int],
    hyperparameters: Sequence[tuple[str, Any]],
    flag: bool,
    process_group: dist.ProcessGroup | None,
) -> tuple[list[bool], bool]:
    """Which parameters have a gradient, the same answer on every rank. Collective.

    Args:
        placed: All parameters of the optimizer.
        trainable: Positions of those that were planned for.
        hyperparameters: Named values that must be equal on all ranks in this step.
        flag: Something that holds for all ranks as soon as it holds on one.
        process_group: The ranks that step together.

    Returns:
        Presence by position, and the flag.

    Raises:
        RanksDisagreeError: A gradient is missing on some ranks only, or a hyperparameter differs.
        ParameterError: A parameter that is not planned for has a gradient.
        UnsupportedError: A gradient is sparse, or of another dtype than its sharded parameter.
    """
    has = [one.parameter.grad is not None for one in placed]
    lacks = [not has[at] and one.local().numel() > 0 for at, one in enumerate(placed)]
    bits = _digest(hyperparameters)
    present, lacking = agree_on_presence(
        [*has, flag, *bits], [*lacks, False, *(not bit for bit in bits)], placed[0].device, process_group
    )
    _raise_on_differing(hyperparameters, present[-DIGEST_BITS:], lacking[-DIGEST_BITS:], process_group)
    for at, one in enumerate(placed):
        if present[at] and lacking[at]:
            raise RanksDisagreeError(
                f"Parameter {one.fqn!r} has a gradient on some ranks and none on others. Gradients must be reduced "
                "before step(): wrap the model in DistributedDataParallel (find_unused_parameters=True where ranks use "
                "different parameters), or all-reduce them yourself."
            )
        if present[at] and at not in trainable:
            raise ParameterError(
                f"Parameter {one.fqn!r} has a gradient, but was frozen (requires_grad=False) when the optimizer was "
                "built. Build the optimizer after unfreezing, or leave the parameter frozen."
            )
        _refuse_odd_gradient(one)
    return present[: len(placed)], present[len(placed)]


def agree_on_hyperparameters(
    hyperparameters: Sequence[tuple[str, Any]], device: torch.device, process_group: dist.ProcessGroup | None
) -> None:
    """Raise ``RanksDisagreeError`` on all ranks when a named value differs. Collective: one small all-reduce."""
    bits = _digest(hyperparameters)
    present, lacking = agree_on_presence(bits, [not bit for bit in bits], device, process_group)
    _raise_on_differing(hyperparameters, present, lacking, process_group)


def _digest(hyperparameters: Sequence[tuple[str, Any]]) -> list[bool]:
    digest = zlib.crc32(repr(hyperparameters).encode())
    return [bool(digest >> bit & 1) for bit in range(DIGEST_BITS)]


def _raise_on_differing(
    hyperparameters: Sequence[tuple[str, Any]],
    present: Sequence[bool],
    lacking: Sequence[bool],
    process_group: dist.ProcessGroup | None,
) -> None:
    """Ranks with equal digests have no bit that one has and another lacks."""
    if not any(some and others for some, others in zip(present, lacking, strict=True)) or num_ranks(process_group) == 1:
        return
    assert_ranks_equal(
        "Hyperparameters differ between ranks",
        hyperparameters,
        "Change them on all ranks alike; a schedule that follows a metric must see the same, reduced metric on all.",
        process_group,
    )


def assert_gradients_reduced(placed: Sequence[PlacedParameter], process_group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks when gradients of replicated parameters are not equal. Collective; worth it once a run."""
    if num_ranks(process_group) == 1:
        return
    marks = [
        (f"the gradient of {one.fqn!r} (fingerprint)", fingerprint(gradient))
        for one in placed
        if one.layout.is_replicated and (gradient := one.local_gradient()) is not None
    ]
    assert_ranks_equal(
        "Gradients differ between ranks in the first step",
        marks,
        "Replicated parameters need reduced gradients: wrap the model in DistributedDataParallel, end gradient "
        "accumulation with a synchronised backward pass, or all-reduce gradients before step().",
        process_group,
    )


def hyperparameters_of(groups: Sequence[ParamGroup], keys: Collection[str]) -> list[tuple[str, Any]]:
    """The groups' values under these keys, named; tensors as numbers."""
    return [
        (f"group {number}, {key}", value.tolist() if isinstance(value, torch.Tensor) else value)
        for number, group in enumerate(groups)
        for key, value in sorted(group.items())
        if key in keys and not callable(value)
    ]


def _refuse_odd_gradient(placed: PlacedParameter) -> None:
    gradient = placed.local_gradient()
    if gradient is None:
        return
    if gradient.is_sparse or (gradient.dtype != placed.dtype and not placed.layout.is_replicated):
        raise UnsupportedError(
            f"The gradient of {placed.fqn!r} is {gradient.layout}, {gradient.dtype}; a sharded parameter of dtype "
            f"{placed.dtype} needs a dense gradient of its own dtype. Set sparse=False in the embedding, or keep "
            "gradients in the parameter's dtype."
        )
