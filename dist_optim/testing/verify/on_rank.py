"""What one rank of a verification does: both sides, step by step, and the comparison."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import torch

from dist_optim.errors import DistOptimError, UnsupportedError
from dist_optim.generators import seed_generators
from dist_optim.integrations.quiet import libraries_silenced
from dist_optim.ranks.agreement import own_rank
from dist_optim.ranks.together import together
from dist_optim.specs.verdict import Verdict
from dist_optim.testing.verify.alone import one_process
from dist_optim.testing.verify.job import Job, gradients, make_model
from dist_optim.testing.verify.sides import make_side, rates_of, set_rates
from dist_optim.verifying.difference import Difference, largest_difference
from dist_optim.verifying.reference import Reference

__all__ = ["Outcome", "verify_on_rank"]

_NEEDS_LOSS = (
    "{name} evaluates the loss itself, in step(closure), and a verification gives gradients alone. Compare it with one "
    "process by hand, with your own closure: dist_optim.testing has RankPool and assert_equal."
)
_STANDS_STILL = (
    "No weight moved in {steps} steps of one process: comparing what stands still proves nothing. Give a learning rate "
    'above 0 (--optim_args "lr=1e-3"), or more --steps.'
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank found; rank 0 alone has the reference, and compares."""

    differences: tuple[Difference, ...] = ()
    """For every step after which some weight differed, the one that differed most."""
    refusal: str = ""
    """Why nothing was compared."""
    error: str = ""
    """The class of that refusal."""
    audit: str = ""
    verdict: Verdict | None = None
    num_compared: int = 0
    """Elements compared after each step."""


def verify_on_rank(job: Job) -> Outcome:
    """Both sides and their comparison. Collective on all ranks of the default group.

    What is refused is told, not raised: it is refused on all ranks.
    """
    try:
        # What upstream compiles takes minutes for shapes that are seen once.
        with libraries_silenced(), torch.compiler.set_stance("force_eager"), contextlib.redirect_stdout(io.StringIO()):
            return _verified(job)
    except DistOptimError as error:
        return Outcome(refusal=str(error), error=type(error).__name__)


def _verified(job: Job) -> Outcome:
    is_first = own_rank() == 0
    seed_generators(0)
    side = make_side(job)
    _refuse_closures(job, side.verdict)
    seed_generators(0)
    reference = together(lambda: one_process(job) if is_first else None, doing="Building the reference")
    rates = None if reference is None else rates_of(reference.optimizer.param_groups, reference.spec)
    start = None if reference is None else reference.weights()
    shapes = make_model(job)
    differences: list[Difference] = []
    for at in range(job.steps):
        given = gradients(shapes, at)
        seed_generators(at)
        side.step(given, at)
        found = side.weights()
        seed_generators(at)

        def compare(at: int = at, found: dict[str, torch.Tensor] = found) -> Difference | None:
            if reference is None or rates is None:
                return None
            set_rates(reference.optimizer.param_groups, rates, at)
            reference.step(gradients(shapes, at))
            expected = {name: one.to(found[name].dtype) for name, one in reference.weights().items()}  # of masters
            return largest_difference(found, expected, at + 1)

        difference = together(compare, doing=f"Step {at + 1} of the reference")
        differences += [] if difference is None else [difference]
    together(lambda: _refuse_standing_still(job, reference, start))
    return Outcome(
        differences=tuple(differences),
        audit=side.audit,
        verdict=side.verdict,
        num_compared=sum(one.numel() for one in shapes.parameters()),
    )


def _refuse_closures(job: Job, verdict: Verdict | None) -> None:
    if verdict is not None and (verdict.needs_closure or verdict.evaluations > 1):
        raise UnsupportedError(_NEEDS_LOSS.format(name=job.name))


def _refuse_standing_still(job: Job, reference: Reference | None, start: dict[str, torch.Tensor] | None) -> None:
    if reference is not None and start is not None and largest_difference(reference.weights(), start, 0) is None:
        raise UnsupportedError(_STANDS_STILL.format(steps=job.steps))
