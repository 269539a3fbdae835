"""``DistributedOptimizer``: any upstream optimizer, with its one-process trajectory, on sharded parameters.

A step reads as the idea does (``stepping.step``). Elementwise groups run upstream on the local slices. For everything
else, round by round: full tensors to their owners, the upstream step there, updated tensors back to who holds them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from dist_optim.errors import DistOptimError, HyperparameterError, UnsupportedError
from dist_optim.exchange.norms import norm_as_clipping
from dist_optim.exchange.plan import Plan
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.at_work import at_work
from dist_optim.ranks.background import look_together
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.hyperparameters import Scope
from dist_optim.specs.once import Once
from dist_optim.specs.registry import Trait
from dist_optim.stepping import audit
from dist_optim.stepping.closures import ON_MANY_RANKS, Evaluations, evaluates, loss_of, mean_loss
from dist_optim.stepping.division import DEFAULT_BUCKET_BYTES, Division
from dist_optim.stepping.edited_groups import parameters_of, why_edited
from dist_optim.stepping.growing import REMEDY, NewGroups, grown, why_fixed
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.loss_scaling import refuse_local_scaler
from dist_optim.stepping.parameter_guard import NO_JOIN
from dist_optim.stepping.presence import StepAgreement
from dist_optim.stepping.step import TrainingStep
from dist_optim.stepping.torch_contract import TorchContract

__all__ = ["DEFAULT_BUCKET_BYTES", "DistributedOptimizer"]


class InsideBackward(Protocol):
    """Takes the updates over from ``step``: see ``dist_optim.inside_backward``."""

    def finish_step(self, problem: DistOptimError | None) -> None:
        """End a training step whose updates backward has made. Collective."""

    def backward(self, loss: Tensor) -> Tensor | None:
        """Back-propagate, and update; returns the norm of all gradients where it was measured. Collective."""

    def why_no_clipping(self) -> str:
        """What to say to who would clip gradients that are gone."""

    def remove(self) -> None:
        """Store gradients again, and update from them in ``step``."""


class VerifiedSteps(Protocol):
    """Takes the first steps a second time, by upstream alone: see ``dist_optim.verifying.shadow``."""

    def before_step(self, has_closure: bool) -> None:
        """Before a step that is agreed on. Collective."""

    def take_gradients(self, part: int, gradients: Mapping[int, Tensor]) -> None:
        """Right before it, with this rank's part of its gradients. Collective."""

    def after_step(self) -> None:
        """Take it again, and compare. Collective."""

    def swap(self, mode: str) -> None:
        """Training and averaged weights are exchanged. Collective."""


class ModelSide(Protocol):
    """The model that an optimizer was built on, as far as a step needs it."""

    def reshard(self) -> None:
        """Free the full copies of sharded parameters that the engine may have left after a forward pass."""

    def problem(self) -> DistOptimError | None:
        """Why the optimizer's parameters are no longer what the model trains; None where they are. Local."""

    def over(self, placed: Sequence[PlacedParameter]) -> ModelSide:
        """The same for the parameters that the optimizer has from now on."""


class DistributedOptimizer(TorchContract):
    """An unmodified upstream optimizer over a placed model; made by ``dist_optim.build_optimizer``.

    Given equal gradients, the parameters after any number of steps are bit for bit those of the upstream optimizer in
    one process. Each rank holds the optimizer state of what it owns, about ``total / world_size``.

    ``param_groups`` hold the model's own parameters and every hyperparameter: changing ``lr`` (or another one that
    upstream keeps per group) takes effect at the next step. Collective on all ranks that train the model: ``step``,
    and ``train`` and ``eval`` of optimizers that swap weights.

    Args:
        division: Who steps what.
        values: What ``starting_values`` returned for it.
        check_ranks_every: Steps between two comparisons of what ranks should hold alike; 0 for none.
        model_side: The model; None for an engine that looks after it itself.
        agreement: What all ranks agree on around a step; one that is shared where an engine steps a model in parts.
        on_nonfinite: What is done where a gradient is infinite or NaN: "raise", "skip", or None for nothing.
    """

    def __init__(
        self,
        division: Division,
        values: Mapping[int, Tensor] | None = None,
        *,
        check_ranks_every: int = 0,
        model_side: ModelSide | None = None,
        agreement: StepAgreement | None = None,
        on_nonfinite: str | None = None,
    ) -> None:
        self.spec = spec = division.spec
        self.inside_backward: InsideBackward | None = None  # set by inside_backward.install
        self.new_groups: NewGroups | None = None  # set by build_optimizer
        self.route_of_gradients = ""  # what inside_backward.to_owners says, where it was asked for
        self.verified_steps: VerifiedSteps | None = None  # the same, where it was asked for
        self.coverage: str | None = None  # of the audit, set by build_optimizer
        self._model_side = model_side
        self._is_built = False
        local, owners = division.build_instances(values)
        first = local or owners[0]
        outer = [
            {**_without_params(own), "params": parameters_of(group["params"])}
            for own, group in zip(first.optimizer.param_groups, division.groups, strict=True)
        ]
        keys = [set(group) for group in outer]
        super().__init__(outer, first.optimizer.defaults)
        for group, own in zip(self.param_groups, keys, strict=True):  # torch adds defaults that upstream's groups lack
            for key in group.keys() - own:
                del group[key]
        self._is_built = True
        constructor_only = set(spec.in_scope(Scope.CONSTRUCTOR))
        self.progress = Progress()
        self.holdings = Holdings(
            spec=spec,
            placed=division.placed,
            groups=self.param_groups,
            plan=division.plan,
            local_instance=local,
            owner_instances=tuple(owners),
            division=division,
            pushed_keys=frozenset({record.name for record in spec.records()} - constructor_only),
            needs_total_norm=spec.driver.needs_total_norm(division.arguments),
            process_group=division.process_group,
            all_ranks=division.all_ranks,
        )
        self.training_step = TrainingStep(
            self.holdings,
            self.progress,
            agreement or StepAgreement(division.all_ranks),
            bucket_bytes=division.bucket_bytes,
            check_ranks_every=check_ranks_every,
            on_nonfinite=on_nonfinite,
        )

    def share_groups(self) -> None:
        """Show on every rank what upstream made of its groups, where one rank alone has it. Collective; once."""
        self.training_step.show_groups()
        self.defaults.update(self.holdings.instances[0].optimizer.defaults)

    # Stepping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Collective on all ranks that train the model.

        What is wrong on one rank is raised on all of them, in this step.

        Raises:
            WrongModeError: ``eval()`` was called, and ``train()`` not since. Nothing was changed.
            HyperparameterError: A param group holds a value that is not allowed, or another than it had, where nothing
                hands it to upstream (``maximize`` of torch's). Nothing was changed.
            RanksDisagreeError: A gradient is there on some ranks and missing on others, a hyperparameter differs, or
                gradients of replicated parameters are not equal. Nothing was changed.
            ParameterError: A parameter that was frozen when the optimizer was built has a gradient, or the model trains
                other parameters than the optimizer's. Nothing was changed.
            UnsupportedError: A gradient is sparse, or of another dtype than its sharded parameter, or the step is taken
                inside torch's ``Join``. Nothing was changed.
            NonFiniteGradientError: A gradient is infinite or NaN, with ``on_nonfinite="raise"``. Nothing was changed.
                With "skip" it is as if ``step`` had not been called; ``num_skipped_steps`` counts.
            StepFailedError: Upstream's step failed on one rank; others are updated.
            BackgroundSaveError: A save with ``asynchronous=True`` failed. This call has done nothing: make it again.
        """
        look_together("step()", self.holdings.all_ranks)
        evaluations = None if closure is None or not evaluates(self.spec) else self._evaluations(closure)
        loss = None if closure is None or evaluations is not None else loss_of(closure)
        problem = self._look_at_model() or self._why_no_step(closure)
        if self.inside_backward is not None:
            self.inside_backward.finish_step(problem)
            return loss
        self.training_step.begin(problem=problem)
        if not self.training_step.is_skipped:
            is_handed_on = evaluations is None and closure is not None and self.spec.verdict is not None
            self._update_and_end(self._handed_on(loss) if is_handed_on else evaluations)
        return loss if evaluations is None else evaluations.returned

    def _evaluations(self, closure: Callable[[], Any]) -> Evaluations:
        def after() -> None:
            present = self.training_step.agree_on_gradients(self._look_at_model(), "step(closure)")
            self.training_step.detached.take_gradients(self.local_gradients(present))

        def before() -> None:
            self.training_step.detached.show_model()
            self.free_gathered_copies()

        return Evaluations(closure, self.holdings, before, after)

    def _handed_on(self, loss: Any) -> Callable[[], Any] | None:
        """For a class that evaluates its closure once, what it returned; None for one that ignores it."""
        verdict = self.spec.verdict
        if verdict is None or not verdict.evaluations:
            return None
        return Once(mean_loss(loss, self.holdings.all_ranks), self.spec.name, ON_MANY_RANKS)

    def _why_no_step(self, closure: Callable[[], Any] | None) -> DistOptimError | None:
        verdict = self.spec.verdict
        if closure is not None or verdict is None or not verdict.needs_closure:
            return None
        return UnsupportedError(
            f"{self.spec.name} evaluates the loss itself: call step(closure), with a function that clears gradients, "
            "makes the forward and the backward pass, and returns the loss, on every rank."
        )

    def _look_at_model(self) -> DistOptimError | None:
        """Before a step: shards in view, the user's own list of groups taken over; what is wrong with the model."""
        self.free_gathered_copies()
        problem = None if self._model_side is None else self._model_side.problem()
        problem = problem or why_edited(self.holdings.members, self.param_groups)
        if problem is not None:
            return problem
        if self.param_groups is not self.holdings.groups:
            self.holdings.groups[:] = self.param_groups
            self.param_groups = self.holdings.groups
        return self.problem_in_groups()

    def problem_in_groups(self, groups: Mapping[int, ParamGroup] | None = None) -> HyperparameterError | None:
        """What is wrong with the values in param groups, or is not handed on to upstream. Local, before updates.

        Args:
            groups: As an engine's user has them now, by the numbers that they have here; its own when None.
        """
        groups = dict(enumerate(self.param_groups)) if groups is None else groups
        if problem := self.spec.problem_in(list(groups.values()), list(groups)):
            return problem
        keys = self.holdings.pushed_keys
        unheard = self.holdings.instances[0].group_values.why_unheard(groups.items(), keys)
        if not unheard:
            return None
        return HyperparameterError(
            f"{self.spec.name}: {unheard}. After building these may be changed: {', '.join(sorted(keys))}. Put back "
            "what was there, or build the optimizer anew."
        )

    def step_part(self, present: Sequence[bool]) -> None:
        """The step of an engine that has agreed on it, over all parts of the model, by itself. Collective.

        Args:
            present: Which parameters have a gradient, the same on every rank.
        """
        with torch.no_grad():
            self.training_step.begin(present)
            self._update_and_end()

    def _update_and_end(self, closure: Callable[[], Any] | None = None) -> None:
        gradients = self.local_gradients(self.training_step.present)
        if self.holdings.needs_total_norm:
            self.training_step.measure(gradients)
            self.training_step.clip_updates_by(self.training_step.total())
        if self.verified_steps is not None:
            self.verified_steps.before_step(closure is not None)
            self.verified_steps.take_gradients(0, gradients)
        with at_work(f"{self.spec.name}: step {self.progress.num_steps + 1}"):
            self.training_step.update(gradients, closure)
        self.training_step.end()
        if self.verified_steps is not None:
            self.verified_steps.after_step()

    def local_gradients(self, present: Sequence[bool]) -> dict[int, Tensor]:
        """This rank's part of every gradient that is to be stepped by; zeros where only other ranks have one."""
        return self.training_step.here.gradients(present)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the global norm of all gradients, exactly as ``torch.nn.utils.clip_grad_norm_`` does in one process.

        Collective. Norms are those of whole tensors, combined in the order of ``model.parameters()``, so the result is
        equal to the bit under every layout; sharded gradients travel once more for it.

        Returns:
            The global norm before clipping: 0-D, equal on all ranks.
        """
        if self.inside_backward is not None:
            raise UnsupportedError(self.inside_backward.why_no_clipping())
        present = self.training_step.agree_on_gradients(self._look_at_model(), "clip_grad_norm_()")
        self.training_step.measure(self.local_gradients(present), norm_as_clipping(norm_type))
        total = self.training_step.total(norm_type)
        if self.training_step.is_skipped:
            return total  # step() finds the same gradients, and names whose they are
        coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for one in self.holdings.placed:
            gradient = one.local_gradient()
            if gradient is not None:
                gradient.mul_(coefficient.to(gradient.device))
        return total

    def backward(self, loss: Tensor) -> Tensor | None:
        """``loss.backward()``; with ``clip_grad_norm`` and a fused backward, twice: for the norm, then for the updates.

        Returns:
            The norm of all gradients together before clipping, where it was measured in this way.
        """
        if self.inside_backward is not None:
            return self.inside_backward.backward(loss)
        torch.autograd.backward(loss)
        return None

    def join_hook(self, **kwargs: Any) -> NoReturn:
        """Refused: asked for by torch's ``Join`` before ranks part."""
        raise UnsupportedError(f"{self.spec.name}: Join was given this optimizer. {NO_JOIN}")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by torch's GradScaler before it looks for gradients to unscale."""
        refuse_local_scaler(self.holdings, sys._getframe(1))
        if self.inside_backward is not None:
            raise UnsupportedError(
                f"{self.spec.name}: GradScaler found out too late for this backward: its scaled gradients were applied "
                "inside backward. Use bfloat16, which needs no scaling, or build with fused_backward=False. The "
                "parameters are spoiled: start again."
            )
        return False

    # Weights for evaluation ---------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the training weights in place. Collective where the optimizer swaps weights; otherwise nothing."""
        self._swap_weights("train")

    def eval(self) -> None:
        """Put the averaged weights in place, as schedule-free methods evaluate and export them. Collective there."""
        self._swap_weights("eval")

    @torch.no_grad()
    def _swap_weights(self, mode: str) -> None:
        if Trait.WEIGHT_SWAPPING in self.spec.traits and mode != self.mode:
            self.meet(f"{mode}()")
            self.free_gathered_copies()
            self.training_step.swap_weights(mode)
            if self.verified_steps is not None:
                self.verified_steps.swap(mode)

    # What there is to see -----------------------------------------------------------------------------------------

    def _call_own_method(self, name: str, *args: Any, **keywords: Any) -> Any:
        gradients = self.local_gradients(self.training_step.agree_on_gradients(self._look_at_model(), f"{name}()"))
        result, is_cleared = self.training_step.call_own_method(name, args, keywords, gradients)
        if is_cleared:
            self.zero_grad()
        return result

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return self.progress.num_steps

    @property
    def num_skipped_steps(self) -> int:
        """Calls of ``step`` that all ranks left out, since the optimizer was built, with ``on_nonfinite="skip"``."""
        return self.progress.num_skipped

    @property
    def mode(self) -> str:
        """``"train"``, or ``"eval"`` while the averaged weights are in place."""
        return self.progress.mode

    @property
    def plan(self) -> Plan:
        """Owners and rounds of what is stepped whole."""
        return self.holdings.plan

    def free_gathered_copies(self) -> None:
        """Free full copies of sharded parameters that the engine may have left: before reading or writing shards."""
        if self._model_side is not None:
            self._model_side.reshard()

    def route_audit(self) -> str:
        """Which algorithm got which tensors, and who steps them: the text that is printed before step 1."""
        text = audit.route_audit(self.holdings, is_inside_backward=self.inside_backward is not None)
        lines = [text, self.coverage, self.route_of_gradients]
        return "\n  ".join(line for line in lines if line)

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, counted on the real storages."""
        return self.holdings.state_bytes()

    def placed_parameters(self) -> list[PlacedParameter]:
        """All parameters and where they are stored, in group order."""
        return list(self.holdings.placed)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step more of the model's parameters, from the next step on, as upstream's own ``add_param_group`` would.

        Between steps, collective on all ranks that train the model, with the same group. What is stepped already keeps
        its state and its owner. Under an engine the parameters must be ones whose gradients it reduces.

        Args:
            param_group: ``params``, and hyperparameters; those that it does not have are the optimizer's.

        Raises:
            UnsupportedError: Upstream settles its groups when it is built, or the engine does.
            ParameterError, HyperparameterError, RanksDisagreeError: On all ranks, as ``build_optimizer``. Nothing was
                changed.
        """
        if not self._is_built:
            super().add_param_group(param_group)
            return
        if reason := self._why_fixed():
            raise UnsupportedError(f"add_param_group after building: {reason} {REMEDY}")
        assert self.new_groups is not None
        self.meet("add_param_group()")
        self.free_gathered_copies()
        self.holdings = grown(self.holdings, self.param_groups, self.new_groups, param_group)
        self.param_groups = self.holdings.groups
        self.training_step = self.training_step.over(self.holdings)
        self._model_side = None if self._model_side is None else self._model_side.over(self.holdings.placed)
        self._view = None
        self.training_step.publish_groups()
        self.holdings.drop_foreign_keys(self.param_groups[-1:])

    def _why_fixed(self) -> str:
        if self.new_groups is None:
            return "the engine has divided the model's parameters."
        if self.inside_backward is not None:
            return "this optimizer steps inside backward, by hooks that are set when it is built."
        if self.route_of_gradients:
            return "with reduce_to_owner=True backward knows the owners from the start."
        return why_fixed(self.holdings)


def _without_params(group: Mapping[str, Any]) -> ParamGroup:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
