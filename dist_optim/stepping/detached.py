"""A step on tensors of upstream's own: for classes that nobody described, coupled tensors, and fp32 masters.

The model is written to when all ranks have come through: where the class fails, on whichever rank, the weights are
those of the step before. It takes room for the whole tensors that a rank owns, and for their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dist_optim.exchange.copies import write_back
from dist_optim.exchange.plan import Bucket, Route
from dist_optim.exchange.rooms import as_if_alone
from dist_optim.exchange.tasks import Task, run_tasks
from dist_optim.exchange.transfer import gather_to_owner, scatter_from_owner
from dist_optim.specs.once import Once
from dist_optim.stepping.at_owner import there_and_parts
from dist_optim.stepping.closures import Evaluations
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.parts_here import PartsHere
from dist_optim.stepping.sharing import OwnersWord
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["Act", "Closure", "DetachedStep"]

Tensors = Mapping[int, Tensor]
Act = Callable[[UpstreamInstance, Tensors], object]
"""What to do with an instance, and the gradients of its parameters."""
Closure = Callable[[], Any] | None


class StepOne(Protocol):
    """Steps an instance, and keeps what it fails with."""

    def __call__(
        self, instance: UpstreamInstance, parameters: Tensors, gradients: Tensors, closure: Closure = None
    ) -> Tensors: ...


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round has brought to its owners."""

    bucket: Bucket
    route: Route
    local: Tensors
    """This rank's part of every tensor of the round."""
    parameters: Tensors
    gradients: Tensors
    """The whole tensors that this rank owns."""


class DetachedStep:
    """Gathers, steps, agrees, and sends back; every rank calls it with the same indices.

    Args:
        held: What is stepped.
        here: What this rank stores of it.
        word: What a sole owner says after it.
        part_of: The part of a round that travels, and its route.
    """

    def __init__(
        self,
        held: Holdings,
        here: PartsHere,
        word: OwnersWord,
        part_of: Callable[[int, Sequence[int]], tuple[Bucket, Route]],
    ) -> None:
        self._held = held
        self._here = here
        self._word = word
        self._part_of = part_of

    def update(self, gradients: Tensors, step_one: StepOne, agree: Callable[[], None], closure: Closure = None) -> None:
        """One upstream step. Collective.

        Args:
            gradients: This rank's part of each, by index.
            step_one: Steps an instance.
            agree: Raises on all ranks when it failed on one.
            closure: Handed on to upstream.
        """
        held, local = self._held, self._held.local_instance
        rounds = self._gathered(gradients, self._indices_shown(gradients))
        self._word.note_generators()
        if local is not None:
            slices = self._here.parameters([index for index in held.local_indices if index in gradients])
            updated = step_one(local, slices, {index: gradients[index] for index in slices}, _own(closure))
        if isinstance(closure, Evaluations):
            updates = self._evaluating(closure, rounds, step_one)
        else:
            updates = [step_one(instance, *whole, _own(closure)) for instance, whole in self._by_instance(rounds)]
        agree()
        if local is not None:
            write_back(updated, slices)
        self._send_back(rounds, {index: tensor for one in updates for index, tensor in one.items()})

    def _evaluating(self, evaluations: Evaluations, rounds: Sequence[_Round], step_one: StepOne) -> list[Tensors]:
        """The step of the one rank that steps, and on the others their part in its evaluations."""
        if not evaluations.is_asking:
            evaluations.serve()
            return []
        updates = [step_one(instance, *whole, evaluations) for instance, whole in self._by_instance(rounds)]
        evaluations.done(self._held.owner_instances[0].returned)
        return updates

    def show_model(self) -> None:
        """Let the model have upstream's weights as they are now, in the middle of a step. Collective."""
        held = self._held
        parts = [
            (bucket, self._part_of(bucket.index, [item.index for item in bucket.items])[1])
            for bucket in held.plan.buckets
        ]
        shadows = {index: one for owner in held.instances for index, one in owner.outgoing().items()}
        run_tasks(
            scatter_from_owner(
                bucket,
                shadows,
                self._here.parameters([item.index for item in bucket.items]),
                route,
                held.process_group,
            )
            for bucket, route in parts
        )

    def take_gradients(self, gradients: Tensors) -> None:
        """Let upstream have these gradients, and no others, in the middle of a step. Collective."""
        rounds = self._gathered(gradients, self._held.plan.owners)
        for instance, (_, whole) in self._by_instance(rounds):
            instance.take_gradients(instance.shadows)
            instance.give(whole)

    def act(self, act: Act, gradients: Tensors) -> None:
        """Act on every instance while its parameters, and these gradients, are in its view. Collective."""
        held, local = self._held, self._held.local_instance
        rounds = self._gathered(gradients, held.plan.owners)
        if local is not None:
            slices = self._here.parameters(local.shadows)
            local.show(slices)
            act(local, {index: one for index, one in gradients.items() if index in local.shadows})
            write_back(local.outgoing(), slices)
        for instance, (parameters, whole_gradients) in self._by_instance(rounds):
            instance.show(parameters)
            act(instance, whole_gradients)
        self.show_model()

    def _indices_shown(self, gradients: Tensors) -> Collection[int]:
        """A parameter without a gradient stays where it is, where nothing is done to it, nor read of it."""
        verdict = self._held.spec.verdict
        is_present_only = not self._held.division.is_together and (verdict is None or not verdict.steps_absent)
        return gradients.keys() if is_present_only else self._held.plan.owners

    def _gathered(self, gradients: Tensors, shown: Collection[int]) -> list[_Round]:
        """The whole tensors of all rounds, and their gradients, at their owners."""
        rounds: list[_Round] = []

        def gather(number: int, indices: Sequence[int]) -> Task[None]:
            group, (bucket, route) = self._held.process_group, self._part_of(number, indices)
            local = self._here.parameters(indices)
            (full,) = yield from gather_to_owner(bucket, [local], route, group)
            full_gradients, parts = there_and_parts({at: gradients[at] for at in indices if at in gradients})
            if parts:
                part, its_route = self._part_of(number, list(parts))
                (more,) = yield from gather_to_owner(part, [parts], its_route, group)
                full_gradients |= more
            aligned = {index: as_if_alone(gradient) for index, gradient in full_gradients.items()}
            rounds.append(_Round(bucket, route, local, full, aligned))

        run_tasks(
            gather(bucket.index, [item.index for item in bucket.items if item.index in shown])
            for bucket in self._held.plan.buckets
        )
        return sorted(rounds, key=lambda one: one.bucket.index)

    def _by_instance(self, rounds: Sequence[_Round]) -> list[tuple[UpstreamInstance, tuple[Tensors, Tensors]]]:
        """Each instance with the tensors that it steps: those of its round, or of all."""
        owners = self._held.owner_instances
        if not self._held.division.is_together:
            return [(owners[one.bucket.index], (one.parameters, one.gradients)) for one in rounds]
        parameters = {index: tensor for one in rounds for index, tensor in one.parameters.items()}
        gradients = {index: tensor for one in rounds for index, tensor in one.gradients.items()}
        return [(owners[0], (parameters, gradients))] if rounds else []

    def _send_back(self, rounds: Sequence[_Round], updated: Tensors) -> None:
        run_tasks(
            scatter_from_owner(one.bucket, updated, one.local, one.route, self._held.process_group) for one in rounds
        )


def _own(closure: Closure) -> Closure:
    """Each instance evaluates once."""
    return closure.again() if isinstance(closure, Once) else closure
