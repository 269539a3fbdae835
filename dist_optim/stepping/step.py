"""One training step: ``begin``, ``update`` for some or all gradients, ``end``. There is no other.

Stored gradients come all at once; hooks inside backward bring them as they are produced; an engine that steps a model
in parts calls an optimizer for each. All are updates of the same step: every parameter is updated once, and what
upstream counts in its groups moves on once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_optim.errors import DistOptimError, WrongModeError
from dist_optim.exchange.copies import write_back
from dist_optim.exchange.norms import NormOf, combine_norms, norm_in_fp32, norm_task
from dist_optim.exchange.plan import Bucket, Item, Route, make_plan
from dist_optim.exchange.rooms import Room, Rooms, as_if_alone
from dist_optim.exchange.tasks import Task, run_tasks
from dist_optim.exchange.transfer import gather_to_owner, scatter_from_owner
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping import half_steps
from dist_optim.stepping.at_owner import bring, there_and_parts
from dist_optim.stepping.before_step import BeforeStep
from dist_optim.stepping.bystander import Bystander
from dist_optim.stepping.detached import Act, DetachedStep
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.own_methods import one_result
from dist_optim.stepping.parts_here import PartsHere
from dist_optim.stepping.presence import StepAgreement
from dist_optim.stepping.sentinel import compare_ranks
from dist_optim.stepping.sharing import OwnersWord
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["TrainingStep"]

MAX_KEPT_PARTS = 4096


class TrainingStep:
    """The parts of a step, over the instances and the plan; it knows no engine, and no source of gradients.

    Gradients come as ``{index: this rank's part}``. All methods are collective; every rank gives the same indices, in
    the same order.

    Args:
        holdings: What is stepped.
        progress: Moves on in ``end``.
        agreement: Of all ranks; one that is shared where an engine steps a model in parts.
        bucket_bytes: Of the rounds in which gradients that are stepped on slices travel to be measured.
        check_ranks_every: Steps between two comparisons of what ranks should hold alike; 0 for none.
        on_nonfinite: What is done where a stored gradient is infinite or NaN: "raise", "skip", or None for nothing.
    """

    def __init__(
        self,
        holdings: Holdings,
        progress: Progress,
        agreement: StepAgreement,
        *,
        bucket_bytes: int,
        check_ranks_every: int = 0,
        on_nonfinite: str | None = None,
    ) -> None:
        self._held = holdings
        self._progress = progress
        self.agreement = agreement
        self._check_ranks_every = check_ranks_every
        self._on_nonfinite = on_nonfinite
        self._bucket_bytes = bucket_bytes
        self._group = holdings.process_group
        self.here = PartsHere(holdings.placed)
        self._before = BeforeStep(holdings, progress, agreement, self.here, on_nonfinite)
        self._rounds = {bucket.index: bucket for bucket in holdings.plan.buckets}
        self._round_of = {item.index: bucket.index for bucket in holdings.plan.buckets for item in bucket.items}
        self._memory = Rooms()
        self._holds_all = num_ranks(self._group) == 1 and all(
            one.layout.is_replicated and one.local().shape == one.shape for one in holdings.placed
        )
        in_place = holdings.instances if len(self._rounds) <= self._holds_all else []
        self._only = in_place[0] if len(in_place) == 1 else None  # it steps everything where it lies
        self._parts: dict[tuple[int, tuple[int, ...]], tuple[Bucket, Route]] = {}
        self._norm_round_of: dict[int, int] | None = None
        self.present: Sequence[bool] = ()
        self._norms: dict[int, Tensor] = {}
        self._norm_dtypes: dict[int, torch.dtype] = {}
        self._total: Tensor | None = None
        self._is_one_by_one = False
        self._word = OwnersWord(holdings)
        self.detached = DetachedStep(holdings, self.here, self._word, self._part_of)

    def over(self, holdings: Holdings) -> TrainingStep:
        """The same, of what is stepped from now on."""
        return TrainingStep(
            holdings,
            self._progress,
            self.agreement,
            bucket_bytes=self._bucket_bytes,
            check_ranks_every=self._check_ranks_every,
            on_nonfinite=self._on_nonfinite,
        )

    def expect_at_owners(self) -> None:
        """From now on backward may leave gradients with their owners (``at_owner``)."""
        self._before.are_sent_to_owners = True

    # Beginning ----------------------------------------------------------------------------------------------------

    def begin(
        self,
        present: Sequence[bool] | None = None,
        problem: DistOptimError | None = None,
        *,
        before_backward: bool = False,
    ) -> None:
        """Agree on what this step is, and give upstream its hyperparameters.

        Args:
            present: Which parameters have a gradient, where the caller has agreed on everything already.
            problem: Why this rank cannot take the step: then none does.
            before_backward: Gradients are still to come, one by one.

        Raises:
            WrongModeError: ``eval()`` was called, and ``train()`` not since.
            RanksDisagreeError: A gradient is there on some ranks and missing on others, a hyperparameter differs, or
                gradients of replicas are not equal.
            ParameterError: A parameter that was frozen when the optimizer was built has a gradient.
            NonFiniteGradientError: A gradient is infinite or NaN, with ``on_nonfinite="raise"``; with "skip" nothing is
                raised, and ``is_skipped`` says that the step is not to be taken.
        """
        problem = problem or self.wrong_mode()
        self._is_one_by_one = before_backward
        if present is None:
            self._before.read_hyperparameters()
            if before_backward:
                present = self._before.agree_without_gradients(problem, "backward()")
            else:
                present = self.agree_on_gradients(problem)
                if self.is_skipped:
                    self._before.note_skip()
                    return
                self._before.meet(present)
        elif problem is not None:
            raise problem
        self.present = present
        for instance in self._held.instances:
            instance.group_values.push(self._held.groups, self._held.pushed_keys)

    def agree_on_gradients(self, problem: DistOptimError | None = None, call: str = "step()") -> list[bool]:
        """Which parameters have a stored gradient, the same answer on every rank; what else ``begin`` raises for."""
        return self._before.agree_on_gradients(problem, call)

    @property
    def is_skipped(self) -> bool:
        """Whether ranks have agreed that this step is not taken: it is as if nobody had asked for it."""
        return self._before.is_skipped()

    def wrong_mode(self) -> WrongModeError | None:
        """Why no step can be taken now, where the weights for evaluation are in place."""
        return self._before.wrong_mode()

    # Updating -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, gradients: Mapping[int, Tensor], closure: Callable[[], Any] | None = None) -> None:
        """Update these parameters by their gradients: all that have one, or after ``before_backward`` some of them."""
        if self._total is not None:
            for instance in self._held.instances:
                self._held.spec.driver.take_total_norm(instance.optimizer, self._total)
        if self._held.division.keeps_tensors:
            self.detached.update(gradients, self._stepped, self._agree_after, closure)
            return
        if self._only is not None and not self._is_one_by_one:
            self._update_in_place(self._only, gradients)
            return
        num_rounds = 0 if self._is_one_by_one else len(self._held.plan.buckets)
        ready: dict[int, list[int]] = {number: [] for number in range(num_rounds)}
        here: list[int] = []
        for index in gradients:
            if index in self._round_of:
                ready.setdefault(self._round_of[index], []).append(index)
            else:
                here.append(index)
        if self._held.local_instance is not None and (here or not self._is_one_by_one):
            self._update_in_place(self._held.local_instance, {index: gradients[index] for index in here})
        if self._holds_all and not self._is_one_by_one:
            for number, indices in ready.items():
                instance = self._held.owner_instances[number]
                self._update_in_place(instance, {index: gradients[index] for index in indices})
            return
        for is_replicated in (False, True):
            rounds = [number for number in ready if self._rounds[number].is_replicated is is_replicated]
            run_tasks((self._update_task(number, ready[number], gradients) for number in rounds), not is_replicated)

    def _update_in_place(self, instance: UpstreamInstance, gradients: Mapping[int, Tensor]) -> None:
        """Upstream on what the model has here: this rank's slices, or all of it in one process."""
        parameters = self.here.parameters([index for index in gradients if index not in instance.of_model])
        updated = self._stepped(instance, parameters, gradients)
        write_back(updated, parameters)
        if self._is_one_by_one:
            instance.release(gradients.keys())
        else:
            instance.show({index: parameters[index] for index, one in updated.items() if one is not parameters[index]})

    def _update_task(self, number: int, indices: Sequence[int], gradients: Mapping[int, Tensor]) -> Task[None]:
        bucket, route = self._part_of(number, indices)
        instance = self._held.owner_instances[number]
        parameters = self.here.parameters(indices)
        room = Room(self._rooms)
        full_gradients, full = yield from bring(
            lambda some: self._part_of(number, some), gradients, parameters, self._group, room
        )
        full_gradients = {index: as_if_alone(gradient) for index, gradient in full_gradients.items()}
        updated = self._stepped(instance, full, full_gradients)
        del full_gradients, full
        if bucket.is_replicated:  # nothing but the model's own tensors is on the way back
            write_back(updated, parameters)
            self._put_down(bucket, instance, updated, parameters)
            yield from scatter_from_owner(bucket, parameters, parameters, route, self._group, room)
        else:
            yield from scatter_from_owner(bucket, updated, parameters, route, self._group, room)
            self._put_down(bucket, instance, updated, parameters)
        room.close()

    def _put_down(
        self,
        bucket: Bucket,
        instance: UpstreamInstance,
        updated: Mapping[int, Tensor],
        parameters: Mapping[int, Tensor],
    ) -> None:
        """After a round's way back: owners free their full tensors; what they share with the model, they keep."""
        if bucket.is_replicated and not self._is_one_by_one:
            instance.show({index: parameters[index] for index, one in updated.items() if one is not parameters[index]})
        else:
            instance.release(updated.keys())

    def _stepped(
        self,
        instance: UpstreamInstance,
        parameters: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        closure: Callable[[], Any] | None = None,
    ) -> Mapping[int, Tensor]:
        """Upstream's step; where it fails, the tensors as they were, since other ranks wait for them."""
        try:
            if self._is_one_by_one:
                return instance.step_each(parameters, gradients, self._held.pushed_keys)
            return instance.step(parameters, gradients, self.present, closure)
        except Exception as error:
            self.agreement.note(error)
            return parameters

    @property
    def _rooms(self) -> Rooms | None:
        """Memory that rounds use again: not of a class that nobody described, which may keep what it is given."""
        return None if self._held.spec.is_undescribed or self._is_one_by_one else self._memory

    def _part_of(self, number: int, indices: Sequence[int]) -> tuple[Bucket, Route]:
        """What travels now of a round, and its route: kept, since steps are alike."""
        key = (number, tuple(indices))
        if key not in self._parts:
            if len(self._parts) >= MAX_KEPT_PARTS:
                self._parts.clear()
            part = self._rounds[number].only(set(indices))
            self._parts[key] = part, part.route(self._held.rank)
        return self._parts[key]

    def swap_weights(self, mode: str) -> None:
        """Let upstream exchange training and averaged weights. Collective."""

        def swap(instance: UpstreamInstance, _: Mapping[int, Tensor]) -> None:
            try:
                getattr(instance.optimizer, mode)()
            except Exception as error:
                self.agreement.note(error)

        self._in_view(swap)
        self.agreement.after(f"{self._held.spec.name}.{mode}()", self._progress.num_steps)
        self._progress.mode = mode

    @torch.no_grad()
    def call_own_method(
        self, name: str, args: Sequence[Any], keywords: Mapping[str, Any], gradients: Mapping[int, Tensor]
    ) -> tuple[Any, bool]:
        """Call a method of upstream's own on all instances, with parameters and gradients in its view. Collective.

        Returns:
            What it returns, and whether it has cleared the gradients.

        Raises:
            StepFailedError: On all ranks: it failed on one.
            UnsupportedError: On all ranks: it changes gradients, or returns something else for each part.
        """
        results: list[tuple[Any, bool]] = []

        def call(instance: UpstreamInstance, own: Mapping[int, Tensor]) -> None:
            if isinstance(instance, Bystander):
                return
            try:
                results.append(instance.call(name, args, keywords, own))
            except Exception as error:
                self.agreement.note(error)
                results.append((None, False))

        self._progress.num_calls += 1
        self._in_view(call, gradients)
        self.agreement.after(f"{self._held.spec.name}.{name}()", self._progress.num_steps)
        return one_result(name, results, self._held)

    def _in_view(self, act: Act, gradients: Mapping[int, Tensor] | None = None) -> None:
        """Act on every instance while its parameters, and gradients, are in its view. Collective."""
        local, gradients = self._held.local_instance, gradients or {}
        self._is_one_by_one = False
        for instance in self._held.instances:
            instance.group_values.push(self._held.groups, self._held.pushed_keys)
        if self._held.division.keeps_tensors:
            self.detached.act(act, gradients)
            self.publish_groups()
            return
        if local is not None:
            local.show(self.here.parameters(local.shadows))
            act(local, {index: one for index, one in gradients.items() if index in local.shadows})
        run_tasks(self._view_task(number, act, gradients) for number in range(len(self._held.plan.buckets)))
        self.publish_groups()

    def _view_task(self, number: int, act: Act, gradients: Mapping[int, Tensor]) -> Task[None]:
        bucket, instance = self._held.plan.buckets[number], self._held.owner_instances[number]
        _, route = self._part_of(number, [item.index for item in bucket.items])
        parameters = self.here.parameters([item.index for item in bucket.items])
        (full,) = yield from gather_to_owner(bucket, [parameters], route, self._group)
        full_gradients, parts = there_and_parts({at: one for at, one in gradients.items() if at in parameters})
        if parts:
            part, its_route = self._part_of(number, list(parts))
            (more,) = yield from gather_to_owner(part, [parts], its_route, self._group)
            full_gradients |= more
        instance.show(full)
        act(instance, full_gradients)
        updated = {index: instance.shadows[index].data for index in full}
        yield from scatter_from_owner(bucket, updated, parameters, route, self._group)
        self._put_down(bucket, instance, updated, parameters)

    # The norm of all gradients ------------------------------------------------------------------------------------

    @property
    def lacks_total_norm(self) -> bool:
        """Whether updates need the norm of all gradients together, and it has not been measured in this step."""
        return self._held.needs_total_norm and self._total is None

    @torch.no_grad()
    def measure(self, gradients: Mapping[int, Tensor], norm_of: NormOf = norm_in_fp32) -> None:
        """Take the norms of these gradients, each of the whole tensor, at its owner; nothing is updated."""
        cut: dict[int, list[int]] = {}
        round_of = self._rounds_of_norms()
        there, parts = there_and_parts(gradients)
        self._norms |= {index: norm_of(whole) for index, whole in there.items()}
        for index, gradient in gradients.items():
            self._norm_dtypes[index] = torch.float32 if norm_of is norm_in_fp32 else gradient.dtype
        for index, gradient in parts.items():
            if index in round_of:
                cut.setdefault(round_of[index], []).append(index)
            elif self._held.rank == 0:
                self._norms[index] = norm_of(gradient)
        run_tasks(
            norm_task(bucket, gradients, self._norms, norm_of, route, self._group, Room(self._rooms))
            for bucket, route in (self._part_of(number, indices) for number, indices in cut.items())
        )

    @torch.no_grad()
    def total(self, norm_type: float = 2.0) -> Tensor:
        """Combine the norms that were measured, in the order of ``model.parameters()``; forgets them."""
        placed = self._held.placed
        order = sorted(self._norm_dtypes, key=lambda index: placed[index].position)
        dtypes = [self._norm_dtypes[index] for index in order]
        total = combine_norms(self._norms, order, dtypes, placed[0].device, self._group, norm_type)
        self._norms.clear()
        self._norm_dtypes.clear()
        return total

    def forget_norms(self) -> None:
        """Drop what was measured: the gradients that it is about will not be updated by."""
        self._norms.clear()
        self._norm_dtypes.clear()
        self._total = None

    def clip_updates_by(self, total: Tensor) -> None:
        """Let the updates of this step know the norm of all gradients."""
        self._total = total

    def _rounds_of_norms(self) -> Mapping[int, int]:
        """The round in which each sharded gradient travels to be measured; of what is stepped on slices, its own."""
        if self._norm_round_of is None:
            placed, held = self._held.placed, self._held
            sharded = [bucket for bucket in held.plan.buckets if not bucket.is_replicated and len(bucket.owned) > 1]
            slices = [placed[index] for index in held.local_indices]
            items = [
                Item(index, one.shape, one.layout, one.dtype, one.device, float(one.shape.numel()))
                for index, one in zip(held.local_indices, slices, strict=True)
                if not one.layout.is_replicated
            ]
            more = make_plan(items, num_ranks(self._group), self._bucket_bytes).buckets if items else ()
            first = len(held.plan.buckets)
            self._rounds |= {first + at: bucket for at, bucket in enumerate(more)}
            rounds = {**{bucket.index: bucket for bucket in sharded}, **dict(enumerate(more, first))}
            self._norm_round_of = {item.index: at for at, bucket in rounds.items() for item in bucket.items}
        return self._norm_round_of

    # Ending -------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End the training step: groups move on, and what one rank failed at all ranks raise.

        Raises:
            StepFailedError: On all ranks: upstream's step failed on one.
            WrongModeError: A hyperparameter was changed after updates were made with the old one.
            RanksDisagreeError: Every ``check_ranks_every`` steps, on all ranks.
        """
        held, progress = self._held, self._progress
        if self._is_one_by_one:
            self._note_changed_values()
            for instance in held.instances:
                instance.tick(held.pushed_keys)
        self._total = None
        if not held.division.keeps_tensors:  # such a class is agreed on before the model is written to
            self._agree_after()
        self.publish_groups()
        progress.num_steps += 1
        if self._check_ranks_every and progress.num_steps % self._check_ranks_every == 0:
            compare_ranks(held, progress)

    def abandon(self) -> None:
        """Note that this step has failed after updates were made. Local; on all ranks."""
        self._progress.failed_step = self._progress.num_steps + 1
        half_steps.leave_half((one.parameter for one in self._held.placed), self._progress.failed_step)

    def _note_changed_values(self) -> None:
        changed = self._before.changed_value()
        if changed is not None:
            self.agreement.note(
                WrongModeError(
                    f"{self._held.spec.name}: {changed} was changed between backward and step(), after the updates "
                    "were made. Change hyperparameters after step(), as schedulers do: scheduler.step() follows "
                    "optimizer.step()."
                )
            )

    def _agree_after(self) -> None:
        try:
            self.agreement.after(self._held.spec.name, self._progress.num_steps)
        except Exception:
            self.abandon()
            raise

    def publish_groups(self) -> None:
        """Show in the user's groups what upstream has in its own: state dicts are read from ours.

        Collective where one rank steps for all.
        """
        self._word.spread()
        for group, values in zip(self._held.groups, self._held.published(), strict=True):
            group.update(values)

    def show_groups(self) -> None:
        """Once, at first: the user's groups have upstream's keys and no others. Collective as ``publish_groups``."""
        self.publish_groups()
        self._held.drop_foreign_keys(self._held.groups)
