"""What all ranks that train the model agree on around a step: a few bytes to each other before it, and after it.

Before: which parameters have a gradient, that hyperparameters are equal, that gradients of replicas are (a sample), and
that no rank has found something that forbids the step. After: that no rank failed in it. Both go over the host, so that
neither waits for an accelerator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_optim.errors import DistOptimError, RanksDisagreeError, StepFailedError
from dist_optim.ranks.agreement import (
    agree_on_bits,
    described,
    gather_objects,
    host_group,
    num_ranks,
    own_rank,
    raise_first_difference,
)
from dist_optim.ranks.liveness import report_failure
from dist_optim.ranks.meeting import left_behind, waited_for
from dist_optim.ranks.together import raise_together
from dist_optim.specs.driver import ParamGroup

__all__ = ["PartOfAgreement", "StepAgreement", "hyperparameters_of"]

DIGEST_BITS = 32


class StepAgreement:
    """The two agreements of the steps of one optimizer; ``note`` keeps what failed in between.

    Args:
        ranks: All ranks that train the model, replicas of shard groups included.
    """

    is_skipping = False
    """Whether ranks have agreed to leave out the step that ``before`` was last asked for."""

    def __init__(self, ranks: dist.ProcessGroup | None) -> None:
        self._ranks = ranks
        self._group = host_group(ranks)
        self._is_alone = num_ranks(ranks) == 1
        self._failure: Exception | None = None

    def before(
        self,
        names: Sequence[str],
        has: Sequence[bool],
        lacks: Sequence[bool],
        values: Sequence[tuple[str, Any]] = (),
        samples: Sequence[int | None] = (),
        problem: DistOptimError | None = None,
        explain: Callable[[], None] = lambda: None,
        call: str = "step()",
        skips: bool = False,
    ) -> list[bool]:
        """Which parameters have a gradient, the same answer on every rank. Collective.

        Args:
            names: Parameters, in the same order on every rank.
            has: Which of them have a gradient here.
            lacks: Which of them should have one here if they have one anywhere, and have none.
            values: Named values that must be equal on all ranks in this step.
            samples: Digests that must be equal on all ranks that give one in the same place.
            problem: Why this rank cannot take the step.
            explain: Collective; raises with what exactly differs, when samples do.
            call: What the user has called, on every rank.
            skips: Whether this rank leaves the step out: then all do, ``is_skipping`` says so, and nothing else is
                compared.

        Raises:
            DistOptimError: On all ranks, what was a problem on any.
            RanksDisagreeError: On all ranks: a gradient is missing on some only, or values or gradients differ. On this
                rank, while the others are ended with its reason: an earlier call was refused, and still waits.
        """
        if self._is_alone:
            if problem is not None:
                raise problem
            self.is_skipping = skips
            return list(has)
        if reason := left_behind(self._ranks):
            report_failure(reason)
            raise RanksDisagreeError(f"{reason}. No parameter was changed here.")
        digests = [_digest([("call", call), *values]), *samples]
        mine = [bit for digest in digests for bit in _bits(digest)]
        others = [not bit for bit in mine]
        silent = [digest is None for digest in digests for _ in range(DIGEST_BITS)]
        mine, others = ([bit and not mute for bit, mute in zip(row, silent, strict=True)] for row in (mine, others))
        first = [problem is not None, skips]

        def wait(work: dist.Work) -> None:
            waited_for(work, call, self._ranks)

        bits = [*first, *has, *mine], [False, False, *lacks, *others]
        some, not_all = agree_on_bits(*bits, self._group, wait)
        has_problem, self.is_skipping, *some = some
        not_all = not_all[len(first) :]
        if has_problem:
            raise_together(problem, self._ranks)
        end = len(names)
        if self.is_skipping:
            return some[:end]
        differs = [here and there for here, there in zip(some[end:], not_all[end:], strict=True)]
        if any(differs[:DIGEST_BITS]):
            _raise_on_values(call, values, self._ranks)
        for name, is_present, is_lacking in zip(names, some[:end], not_all[:end], strict=True):
            if is_present and is_lacking:
                raise RanksDisagreeError(
                    f"Parameter {name!r} has a gradient on some ranks and none on others. All must hold the mean over "
                    "the ranks before step(). DistributedDataParallel sees to it (find_unused_parameters=True where "
                    "ranks use different layers); FSDP does for what it shards, where all ranks run the same layers, "
                    "and not for ignored parameters; else all-reduce gradients yourself, zeros where a rank has none. "
                    "No parameter was changed."
                )
        if any(differs[DIGEST_BITS:]):
            explain()
            raise RanksDisagreeError(
                "Gradients differ between ranks that hold the same parameters. They must be reduced before step(): "
                "end gradient accumulation with a synchronised backward pass (outside no_sync()), train the model "
                "through its engine, and change gradients on all ranks alike. No parameter was changed."
            )
        return some[:end]

    def note(self, error: Exception) -> None:
        """Keep the first error of this step until the exchange that other ranks wait for is done."""
        if self._failure is None:
            self._failure = error

    def after(self, name: str, num_steps: int) -> None:
        """At the end of a step. Collective.

        Raises:
            StepFailedError: On all ranks, when upstream's step failed on any; raised from that rank's own error. A
                process that trains alone raises that one.
            DistOptimError: On all ranks, what was noted on any.
        """
        failure, self._failure = self._failure, None
        if self._is_alone:
            if failure is not None:
                raise failure
            return
        (has_failed,), _ = agree_on_bits([failure is not None], [False], self._group)
        if not has_failed:
            return
        error = failure if isinstance(failure, DistOptimError) else None
        if failure is not None and error is None:
            error = StepFailedError(
                f"{name}: step {num_steps + 1} failed on rank {own_rank(self._ranks)} with {type(failure).__name__}: "
                f"{str(failure).strip().rstrip('.') or 'no text'}. Other parameters of this step are updated: resume "
                "from the last checkpoint."
            )
            error.__cause__ = failure
        raise_together(error, self._ranks)


class PartOfAgreement(StepAgreement):
    """For an optimizer that an engine calls for one part of a step: the whole step's agreement speaks for all parts."""

    def __init__(self, whole: StepAgreement) -> None:
        self._whole = whole

    def note(self, error: Exception) -> None:
        """Keep it for the end of the whole step."""
        self._whole.note(error)

    def after(self, name: str, num_steps: int) -> None:
        """Nothing: the whole step has not ended."""


def hyperparameters_of(groups: Sequence[ParamGroup], keys: Collection[str]) -> list[tuple[str, Any]]:
    """The groups' values under these keys, named; tensors as numbers."""
    return [
        (f"group {number}, {key}", value.tolist() if isinstance(value, torch.Tensor) else value)
        for number, group in enumerate(groups)
        for key, value in sorted(group.items())
        if key in keys and not callable(value)
    ]


def _digest(values: Sequence[tuple[str, Any]]) -> int:
    return zlib.crc32(described(values).encode())


def _bits(digest: int | None) -> list[bool]:
    """Ranks with equal digests have no bit that one has and another lacks."""
    return [bool((digest or 0) >> bit & 1) for bit in range(DIGEST_BITS)]


def _raise_on_values(call: str, values: Sequence[tuple[str, Any]], ranks: dist.ProcessGroup | None) -> None:
    gathered = gather_objects((call, [(name, repr(value)) for name, value in values]), ranks)
    raise_first_difference(
        "Ranks have parted",
        [[("the call", repr(theirs))] for theirs, _ in gathered],
        "Make the same calls, in the same order, on every rank.",
    )
    raise_first_difference(
        "Hyperparameters differ between ranks",
        [theirs for _, theirs in gathered],
        "Change them on all ranks alike; a schedule that follows a metric must see the same, reduced metric on all.",
    )
