"""Comparisons between a subject and its reference, each named for what it promises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def assert_equal(actual: object, expected: object, message: str = "") -> None:
    """Raise unless both hold the same values, exactly.

    Tensors must agree in shape, dtype, device and every element; NaN equals NaN, and zero equals minus zero. Sequences
    and mappings are compared member by member.

    Args:
        actual: A tensor, a number, or a (nested) sequence or mapping of them.
        expected: The reference, built alike.
        message: Put before the report of the difference, for instance the name of the case.

    Raises:
        AssertionError: They differ; the report says where and by how much.
    """

    def with_message(report: str) -> str:
        return f"{message}: {report}" if message else report

    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=with_message)


def max_abs_difference(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Return the largest absolute difference between elements, computed in fp64.

    A NaN on either side gives NaN, which is neither equal to nor below any bound; tensors without elements give 0.

    Raises:
        ValueError: The two sides differ in their number of tensors or in a shape.
    """
    pairs = _paired(actual, expected)
    largest = [(left - right).abs().max() for left, right in pairs if left.numel() > 0]
    return torch.stack(largest).max().item() if largest else 0.0


def relative_distance(weights: Sequence[Tensor], reference: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """Return ``||weights - reference|| / ||reference - start||`` over all tensors together, computed in fp64.

    It is the error of a trajectory in units of the way travelled, so one bound serves models and learning rates alike.

    Args:
        weights: Where the subject arrived.
        reference: Where the reference run arrived; same order and shapes.
        start: Where both began; same order and shapes.

    Raises:
        ValueError: The reference did not move, or the three differ in number or shape.
    """
    moved = _distance(reference, start)
    if moved == 0.0:
        raise ValueError(
            "relative_distance: the reference equals the start, so there is no way travelled to divide by. "
            "Check that the reference run had gradients, a learning rate above 0, and a copy of its start (clone)."
        )
    return _distance(weights, reference) / moved


def assert_no_problems_on_any_rank(problems: Sequence[str], process_group: dist.ProcessGroup | None = None) -> None:
    """Raise the same report on every rank when any rank met a problem.

    Collective: a body collects its problems in a list and calls this once at its end, so that all ranks take part in
    the same collectives before any of them leaves. Without an initialised process group it speaks for this process.

    Args:
        problems: What this rank found, one sentence each; empty when all is well.
        process_group: The ranks that compare; the default group when None.

    Raises:
        AssertionError: Some rank has a problem; the report names each rank with its problems.
    """
    problems_of_rank = _gather_lists(list(problems), process_group)
    lines = [
        f"  rank {rank}: {problem}" for rank, its_problems in enumerate(problems_of_rank) for problem in its_problems
    ]
    if lines:
        ranks = [str(rank) for rank, its_problems in enumerate(problems_of_rank) if its_problems]
        raise AssertionError(
            f"{len(lines)} problem(s) on rank(s) {', '.join(ranks)} of {len(problems_of_rank)}:\n" + "\n".join(lines)
        )


def _gather_lists(own: list[str], process_group: dist.ProcessGroup | None) -> list[list[str]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size(process_group))]
    dist.all_gather_object(gathered, own, group=process_group)
    return gathered


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    squares = [(a - b).square().sum() for a, b in _paired(left, right)]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0


def _paired(left: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    lefts = [left] if isinstance(left, Tensor) else list(left)
    rights = [right] if isinstance(right, Tensor) else list(right)
    if len(lefts) != len(rights):
        raise ValueError(f"The two sides hold {len(lefts)} and {len(rights)} tensors; compare lists of equal length.")
    pairs = list(zip(lefts, rights, strict=True))
    for index, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            raise ValueError(f"Tensor {index} has shape {tuple(a.shape)} on one side, {tuple(b.shape)} on the other.")
    return [(a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)) for a, b in pairs]
