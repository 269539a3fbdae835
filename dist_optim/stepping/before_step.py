"""What ranks look at and agree on before a step of stored gradients, or before the first one of a backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from dist_optim.errors import DistOptimError, WrongModeError
from dist_optim.stepping.at_owner import forget_weights, weights_changed
from dist_optim.stepping.gradients import GradientSamples, assert_gradients_reduced, odd_gradient, unfrozen
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.nonfinite import first_nonfinite, log_skip, nonfinite_error
from dist_optim.stepping.parts_here import PartsHere
from dist_optim.stepping.presence import StepAgreement, hyperparameters_of

__all__ = ["BeforeStep"]


class BeforeStep:
    """The beginning of ``TrainingStep``, over one agreement.

    Args:
        holdings: What is stepped.
        progress: Counts steps that are left out.
        agreement: Of all ranks.
        here: What this rank stores of it.
        on_nonfinite: What is done where a stored gradient is infinite or NaN: "raise", "skip", or None for nothing.
    """

    def __init__(
        self,
        holdings: Holdings,
        progress: Progress,
        agreement: StepAgreement,
        here: PartsHere,
        on_nonfinite: str | None,
    ) -> None:
        self._held = holdings
        self._here = here
        self._progress = progress
        self._agreement = agreement
        self._on_nonfinite = on_nonfinite
        self.are_sent_to_owners = False
        """Whether backward may leave gradients, and values of parameters, with their owners."""
        self._nonfinite: str | None = None  # the parameter that "skip" is about, on this rank
        self._met: set[int] = set()  # whose gradients were compared between ranks, all of them, once
        self._samples = GradientSamples(holdings.placed, holdings.process_group, holdings.all_ranks)
        self._values: list[tuple[str, object]] = []
        self._names = [one.fqn for one in holdings.placed]
        self._frozen = {index: one for index, one in enumerate(holdings.placed) if not one.is_trained}

    def read_hyperparameters(self) -> None:
        """Take the groups' values for this step: what ranks compare, and what ``changed_value`` is about."""
        self._values = hyperparameters_of(self._held.groups, self._held.pushed_keys)

    def changed_value(self) -> str | None:
        """The first hyperparameter that is another than was agreed on; None where all are as they were."""
        now = hyperparameters_of(self._held.groups, self._held.pushed_keys)
        return next((name for (name, old), (_, new) in zip(self._values, now, strict=True) if old != new), None)

    def agree_on_gradients(self, problem: DistOptimError | None, call: str) -> list[bool]:
        """Which parameters have a stored gradient, the same answer on every rank. Collective.

        Raises:
            DistOptimError: On all ranks; see ``TrainingStep.begin``.
        """
        placed = self._held.placed
        gradients = self._here.all_gradients()
        has = [gradient is not None for gradient in gradients]
        if problem is None and not self._here.are_usual(gradients, has):
            problem = odd_gradient(placed, gradients)
        problem = problem or unfrozen(self._frozen, gradients)
        self._nonfinite = first_nonfinite(placed) if self._on_nonfinite and problem is None else None
        if self._nonfinite is not None and self._on_nonfinite == "raise":
            problem = nonfinite_error(self._held.spec.name, self._nonfinite, self._progress.num_steps)
        return self._agree(has, problem, call)

    def agree_without_gradients(self, problem: DistOptimError | None, call: str) -> list[bool]:
        """On all else, where gradients are still to come. Collective."""
        return self._agree([], problem, call)

    def _agree(self, has: Sequence[bool], problem: DistOptimError | None, call: str) -> list[bool]:
        placed = self._held.placed[: len(has)]
        is_changed = self.are_sent_to_owners and weights_changed(placed)
        *present, is_changed = self._agreement.before(
            [*self._names[: len(has)], "weights"],
            [*has, is_changed],
            [*self._here.lacking(has), False],
            self._values,
            self._samples.take(self._progress.num_steps) if has else (),
            problem,
            self._explain_samples,
            call,
            skips=self._nonfinite is not None,
        )
        if is_changed:
            forget_weights(placed)
        return present

    def _explain_samples(self) -> None:
        placed, ranks = self._held.placed, self._held.all_ranks
        idle = [one for index, one in enumerate(placed) if one.is_idle and index not in self._met]
        assert_gradients_reduced(idle, ranks, are_idle=True)
        assert_gradients_reduced(placed, ranks)

    def is_skipped(self) -> bool:
        """Whether ranks have agreed that this step is not taken: it is as if nobody had asked for it."""
        return self._agreement.is_skipping

    def note_skip(self) -> None:
        """Count a step that is not taken, and say so. Collective."""
        progress, held = self._progress, self._held
        progress.num_skipped += 1
        log_skip(held.spec.name, self._nonfinite, progress.num_steps, progress.num_skipped, held.all_ranks)

    def meet(self, present: Sequence[bool]) -> None:
        """Compare gradients that come for the first time, whole: in the first step, and of what is unfrozen later.

        Collective.

        Raises:
            RanksDisagreeError: On all ranks: gradients of a replicated parameter are not equal.
        """
        if len(self._met) == len(self._names):
            return
        new = [index for index, is_present in enumerate(present) if is_present and index not in self._met]
        if not new:
            return
        members = [self._held.placed[index] for index in new]
        assert_gradients_reduced(members, self._held.all_ranks, are_idle=all(one.is_idle for one in members))
        self._met.update(new)

    def wrong_mode(self) -> WrongModeError | None:
        """Why no step can be taken now, where the weights for evaluation are in place."""
        if self._progress.mode != "eval":
            return None
        return WrongModeError(
            f"{self._held.spec.name}: step() or backward() was called after eval(), while the averaged weights are in "
            "place. Their gradients belong to other weights than upstream would step. Call optimizer.train() on all "
            "ranks before the forward pass of each training phase, and optimizer.eval() before evaluating."
        )
