"""Gradients as they are found at a step: odd ones, and a sample of those that replicas must hold alike."""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import ParameterError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import assert_equal_where_named, assert_ranks_equal, num_ranks, own_rank
from dist_optim.ranks.fingerprints import fingerprint
from dist_optim.stepping.at_owner import AtOwner

__all__ = ["GradientSamples", "assert_gradients_reduced", "odd_gradient", "unfrozen"]

NUM_SAMPLED = 4
"""Tensors a step. Gradients that were not reduced differ almost everywhere."""
OF_ALL = (
    "Replicated parameters need reduced gradients: wrap the model in DistributedDataParallel, end gradient "
    "accumulation with a synchronised backward pass, or all-reduce gradients before step()."
)
OF_OTHERS = (
    "Other parameters are sharded, and their engine does not reduce this one. Under FSDP2 (ignored_params), all-reduce "
    "such gradients, divided by the number of ranks, before step(); under tensor parallelism, give all ranks of the "
    "mesh the same batch."
)
OF_COPIES = (
    "Along a mesh axis that does not cut this parameter every rank holds the same part of it, and needs the same "
    "gradient. Along replicas (HSDP): end gradient accumulation with a synchronised backward pass, and change "
    "gradients on all ranks alike. Along tensor parallelism: give the ranks the same batch and the same dropout."
)
UNCHANGED = "No parameter was changed."
OF_IDLE = (
    "It was frozen when the optimizer was built: DistributedDataParallel reduces no gradient of what was frozen when "
    "it wrapped the model. Wrap it while all that will ever be trained is trainable (find_unused_parameters=True), and "
    "freeze after that; or wrap again and build again when you unfreeze."
)
LAG = 2
"""Steps until a sample on a GPU is read: it has arrived by then, and reading waits for nothing."""


class GradientSamples:
    """Digests of a few elements of a few gradients a step, to be compared between the ranks that hold the same part.

    One digest for replicated parameters; where shards have replicas, or several ranks of the group hold the same parts,
    one for each of those.

    Args:
        placed: All parameters of the optimizer.
        process_group: The ranks that share the work.
        all_ranks: All ranks that train the model.
    """

    def __init__(
        self,
        placed: Sequence[PlacedParameter],
        process_group: dist.ProcessGroup | None,
        all_ranks: dist.ProcessGroup | None,
    ) -> None:
        trained = [one for one in placed if one.is_trained]
        rank, count = own_rank(process_group), num_ranks(process_group)
        whole = [one for one in trained if one.layout.is_replicated] if num_ranks(all_ranks) > 1 else []
        cut = [one for one in trained if not one.layout.is_replicated]
        self._sets: list[_Sampled] = [_Sampled(whole, 1, 0)]
        if num_ranks(all_ranks) > count:
            self._sets.append(_Sampled(cut, count, rank))
        copied: dict[tuple[int, ...], list[PlacedParameter]] = defaultdict(list)
        for one in cut:
            if one.layout.copies > 1:
                copied[tuple(one.layout.holders(other)[0] for other in range(count))].append(one)
        self._sets += [_Sampled(members, count, first[rank]) for first, members in copied.items()]
        self._on_the_way: deque[tuple[list[Tensor | None], torch.cuda.Event]] = deque()

    def take(self, num_steps: int) -> list[int | None]:
        """The digests of this step, or on a GPU of an earlier one; None where this rank has nothing to say."""
        now = [_sample(_some(one.members, num_steps)) for one in self._sets]
        if any(sample is not None and sample.device.type == "cuda" for sample in now):
            on_host = [None if one is None else one.to("cpu", non_blocking=True) for one in now]
            self._on_the_way.append((on_host, _mark()))
            if len(self._on_the_way) <= LAG:
                return [None] * sum(one.num_parts for one in self._sets)
            now, arrived = self._on_the_way.popleft()
            arrived.synchronize()  # long since, unless the host is steps ahead of the GPU
        digests = [None if one is None else zlib.crc32(one.cpu().numpy().tobytes()) for one in now]
        return [
            digest if part == one.part else None
            for one, digest in zip(self._sets, digests, strict=True)
            for part in range(one.num_parts)
        ]


class _Sampled(NamedTuple):
    """Parameters of which this rank holds the same parts as some other ranks do."""

    members: list[PlacedParameter]
    num_parts: int
    part: int
    """Which parts those are."""


def _some(members: Sequence[PlacedParameter], num_steps: int) -> list[PlacedParameter]:
    """Other ones in each step, the same on every rank."""
    first = num_steps * NUM_SAMPLED
    return [members[(first + at) % len(members)] for at in range(min(NUM_SAMPLED, len(members)))]


def _mark() -> torch.cuda.Event:
    """A point in the current stream: what was enqueued before it is done when it has been reached."""
    event = torch.cuda.Event()
    event.record()
    return event


def _sample(members: Sequence[PlacedParameter]) -> Tensor | None:
    """The middle elements of their gradients; None where there is none."""
    gradients = [one.local_gradient() for one in members]
    picked = [
        gradient.reshape(-1)[gradient.numel() // 2].float()
        for gradient in gradients
        if gradient is not None and not gradient.is_sparse and gradient.numel() and not isinstance(gradient, AtOwner)
    ]
    return torch.stack(picked) if picked else None


def odd_gradient(placed: Sequence[PlacedParameter], gradients: Sequence[Tensor | None]) -> UnsupportedError | None:
    """Why one of the parameters' gradients cannot be stepped by; None where all can. Local."""
    for one, gradient in zip(placed, gradients, strict=True):
        if gradient is not None and not one.takes(gradient) and (reason := _why_odd(one, gradient)):
            return UnsupportedError(f"The gradient of {one.fqn!r} {reason} No parameter was changed.")
    return None


def _why_odd(one: PlacedParameter, gradient: Tensor) -> str:
    if gradient.is_sparse:
        return "is sparse, and only dense ones are stepped by. Set sparse=False in the embedding."
    if misplaced := one.why_misplaced(gradient):
        return misplaced
    if not one.layout.is_replicated and (shape := one.part_of(gradient).shape) != (local := one.local()).shape:
        return (
            f"has shape {tuple(shape)}, and this rank's part of the parameter {tuple(local.shape)}. FSDP1 keeps whole "
            "gradients, not reduced, inside no_sync(): end gradient accumulation with a backward pass outside it."
        )
    if gradient.dtype != one.dtype:
        return (
            f"is {gradient.dtype}, and the parameter {one.dtype}, as its grad_dtype allows: upstream's state has the "
            "parameter's dtype. Leave grad_dtype alone; for precise updates keep the parameters in float32, and "
            "compute in half precision by autocast or the engine's mixed precision."
        )
    return ""


def unfrozen(frozen: Mapping[int, PlacedParameter], gradients: Sequence[Tensor | None]) -> ParameterError | None:
    """The first parameter with a gradient of those that nobody trains, by index; None without any. Local."""
    for index, one in frozen.items():
        if gradients[index] is not None:
            return ParameterError(
                f"Parameter {one.fqn!r} has a gradient, but was frozen (requires_grad=False) when the optimizer was "
                "built, and no group named it, so that nobody steps it. Let it be trainable when the model is wrapped "
                "and the optimizer built, and freeze it after that; or list it in params=[{'params': [...]}] of "
                "build_optimizer, frozen as it is; or leave it frozen."
            )
    return None


def assert_gradients_reduced(
    placed: Sequence[PlacedParameter], ranks: dist.ProcessGroup | None, *, are_idle: bool = False
) -> None:
    """Raise on all ranks when gradients of replicated parameters are not equal, naming one. Collective.

    It reads every gradient: worth it once for each parameter, and to explain a sample that differs.

    Args:
        placed: Parameters, the same on every rank.
        ranks: All ranks that train the model.
        are_idle: Whether all of them were frozen when the optimizer was built.
    """
    if num_ranks(ranks) == 1:
        return
    marks = [
        (f"the gradient of {one.fqn!r} (fingerprint)", fingerprint(gradient))
        for one in placed
        if one.layout.is_replicated and not isinstance(gradient := one.local_gradient(), AtOwner | None)
    ]
    is_engines = any(not one.layout.is_replicated for one in placed)
    assert_ranks_equal(
        "Gradients differ between ranks",
        marks,
        f"{OF_IDLE if are_idle else OF_OTHERS if is_engines else OF_ALL} {UNCHANGED}",
        ranks,
    )
    copied = [one for one in placed if one.layout.copies > 1]
    if copied:
        parts = [(one, one.layout.holders(own_rank(one.process_group))[0]) for one in copied]
        held = {
            f"the gradient of part {part} of {one.fqn!r} (fingerprint)": fingerprint(gradient)
            for one, part in parts
            if (gradient := one.local_gradient()) is not None
        }
        assert_equal_where_named("Gradients differ between ranks:", held, f"{OF_COPIES} {UNCHANGED}", ranks)
