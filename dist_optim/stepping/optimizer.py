"""``DistributedOptimizer``: any upstream optimizer, with its one-process trajectory, on sharded parameters.

A step reads as the idea does (``stepping.step``). Elementwise groups run upstream on the local slices. For everything
else, round by round: full tensors to their owners, the upstream step there, updated tensors back to who holds them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import DistOptimError, UnsupportedError
from dist_optim.exchange.norms import norm_as_clipping
from dist_optim.exchange.plan import Plan
from dist_optim.exchange.routing import plan_owners, refuse_misfits, runs_on_local_slices
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import assert_ranks_equal, num_ranks, own_rank
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.hyperparameters import Scope, problem_of
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping import audit
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.loss_scaling import refuse_local_scaler
from dist_optim.stepping.parameter_guard import NO_JOIN
from dist_optim.stepping.presence import StepAgreement
from dist_optim.stepping.step import TrainingStep
from dist_optim.stepping.torch_contract import TorchContract
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["DistributedOptimizer"]

DEFAULT_BUCKET_BYTES = 64 << 20


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


class ModelSide(Protocol):
    """The model that an optimizer was built on, as far as a step needs it."""

    def reshard(self) -> None:
        """Free the full copies of sharded parameters that the engine may have left after a forward pass."""

    def problem(self, groups: Sequence[ParamGroup]) -> DistOptimError | None:
        """Why these groups are no longer what the model trains; None where they are. Local."""


class DistributedOptimizer(TorchContract):
    """An unmodified upstream optimizer over a placed model; made by ``dist_optim.build_optimizer``.

    Given equal gradients, the parameters after any number of steps are bit for bit those of the upstream optimizer in
    one process. Each rank holds the optimizer state of what it owns, about ``total / world_size``.

    ``param_groups`` hold the model's own parameters and every hyperparameter: changing ``lr`` (or another one that
    upstream keeps per group) takes effect at the next step. Collective on all ranks that train the model: ``step``,
    and ``train`` and ``eval`` of optimizers that swap weights.

    Args:
        spec: The optimizer.
        groups: Param groups; ``params`` lists the ``PlacedParameter`` of the group.
        arguments: Constructor keywords for upstream.
        process_group: The ranks that share the work; the default group when None.
        bucket_bytes: The most that a rank's buffer for one field of a round takes.
        check_ranks_every: Steps between two comparisons of what ranks should hold alike; 0 for none.
        all_ranks: All ranks that train the model: also the replicas of a shard group (HSDP).
        model_side: The model; None for an engine that looks after it itself.
        agreement: What all ranks agree on around a step; one that is shared where an engine steps a model in parts.
        on_nonfinite: What is done where a gradient is infinite or NaN: "raise", "skip", or None for nothing.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: Sequence[ParamGroup],
        arguments: Mapping[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        check_ranks_every: int = 0,
        all_ranks: dist.ProcessGroup | None = None,
        model_side: ModelSide | None = None,
        agreement: StepAgreement | None = None,
        on_nonfinite: str | None = None,
    ) -> None:
        self.spec = spec
        self.inside_backward: InsideBackward | None = None  # set by inside_backward.install
        self._model_side = model_side
        self._is_built = False
        # One entry a parameter, in group order: the index that everything below counts by.
        placed = tuple(one for group in groups for one in group["params"])
        values = [{**arguments, **_without_params(group)} for group in groups for _ in group["params"]]
        members = {index: (one, values[index]) for index, one in enumerate(placed) if one.is_trained}
        refuse_misfits(spec, list(members.values()), is_divided=num_ranks(all_ranks) > 1)
        if spec.driver.needs_total_norm(arguments) and any(isinstance(one.layout, Elsewhere) for one in placed):
            raise UnsupportedError(
                f"{spec.name}: clip_grad_norm needs all gradients at once, and the engine steps one part of them after "
                'another. Let the engine clip ("gradient_clipping" in DeepSpeed\'s configuration).'
            )
        here = {index: member for index, member in members.items() if not isinstance(member[0].layout, Elsewhere)}
        slices = [index for index, member in here.items() if runs_on_local_slices(spec, *member)]
        owned = {index: member for index, member in here.items() if index not in slices}
        plan = plan_owners(spec, owned, bucket_bytes, process_group)

        def build_instances() -> tuple[UpstreamInstance | None, list[UpstreamInstance]]:
            return _build_instances(spec, groups, arguments, placed, slices, plan, own_rank(process_group))

        local, owners = build_instances()
        first = local or owners[0]
        self._fixed = [_without_params(group) for group in first.optimizer.param_groups]
        outer = [
            {**own, "params": [one.parameter for one in group["params"]]}
            for own, group in zip(self._fixed, groups, strict=True)
        ]
        super().__init__(outer, first.optimizer.defaults)
        self._is_built = True
        constructor_only = set(spec.in_scope(Scope.CONSTRUCTOR))
        self.progress = Progress()
        self.holdings = Holdings(
            spec=spec,
            placed=placed,
            groups=self.param_groups,
            plan=plan,
            local_instance=local,
            owner_instances=tuple(owners),
            build_instances=build_instances,
            pushed_keys=frozenset({record.name for record in spec.records()} - constructor_only),
            needs_total_norm=spec.driver.needs_total_norm(arguments),
            process_group=process_group,
            all_ranks=all_ranks,
        )
        self.training_step = TrainingStep(
            self.holdings,
            self.progress,
            agreement or StepAgreement(all_ranks),
            bucket_bytes=bucket_bytes,
            check_ranks_every=check_ranks_every,
            on_nonfinite=on_nonfinite,
        )

    def agree_on_plan(self) -> None:
        """Compare names, shapes, layouts, owners and hyperparameters over the ranks. Collective; once, after building.

        Raises:
            RanksDisagreeError: On all ranks, with the first entry that differs.
        """
        items: list[tuple[str, Any]] = [("optimizer", self.spec.name)]
        for number, values in enumerate(self._fixed):
            items += [(f"group {number}, {key}", value) for key, value in values.items() if not callable(value)]
        round_of = {item.index: bucket.index for bucket in self.plan.buckets for item in bucket.items}
        for index, one in enumerate(self.holdings.placed):
            described = (tuple(one.shape), one.dtype, one.layout, one.is_trained, one.is_idle)
            travel = ("owner", self.plan.owners.get(index), "round", round_of.get(index))
            items.append((f"parameter {one.fqn!r}", (*described, *travel)))
        assert_ranks_equal(
            f"The plan of {self.spec.name!r} differs between ranks",
            items,
            "Build the same model, with the same arguments, on every rank.",
            self.holdings.all_ranks,
        )

    # Stepping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Collective on all ranks that train the model.

        What is wrong on one rank is raised on all of them, in this step.

        Raises:
            WrongModeError: ``eval()`` was called, and ``train()`` not since. Nothing was changed.
            HyperparameterError: A param group holds a value that is not allowed. Nothing was changed.
            RanksDisagreeError: A gradient is there on some ranks and missing on others, a hyperparameter differs, or
                gradients of replicated parameters are not equal. Nothing was changed.
            ParameterError: A parameter that was frozen when the optimizer was built has a gradient, or the model trains
                other parameters than the optimizer's. Nothing was changed.
            UnsupportedError: A gradient is sparse, or of another dtype than its sharded parameter, or the step is taken
                inside torch's ``Join``. Nothing was changed.
            NonFiniteGradientError: A gradient is infinite or NaN, with ``on_nonfinite="raise"``. Nothing was changed.
                With "skip" it is as if ``step`` had not been called; ``num_skipped_steps`` counts.
            StepFailedError: Upstream's step failed on one rank; others are updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        problem = self._look_at_model()
        if self.inside_backward is not None:
            self.inside_backward.finish_step(problem)
            return loss
        self.training_step.begin(problem=problem)
        if not self.training_step.is_skipped:
            self._update_and_end()
        return loss

    def _look_at_model(self) -> DistOptimError | None:
        """Before a step: shards in view, the user's own list of groups taken over; what is wrong with the model."""
        if self.param_groups is not self.holdings.groups:
            self.holdings.groups[:] = self.param_groups
            self.param_groups = self.holdings.groups
        self.free_gathered_copies()
        problem = problem_of(self.spec.name, self.spec.records(), self.param_groups)
        return problem or (None if self._model_side is None else self._model_side.problem(self.param_groups))

    def step_part(self, present: Sequence[bool]) -> None:
        """The step of an engine that has agreed on it, over all parts of the model, by itself. Collective.

        Args:
            present: Which parameters have a gradient, the same on every rank.
        """
        with torch.no_grad():
            self.training_step.begin(present)
            self._update_and_end()

    def _update_and_end(self) -> None:
        gradients = self._local_gradients(self.training_step.present)
        if self.holdings.needs_total_norm:
            self.training_step.measure(gradients)
            self.training_step.clip_updates_by(self.training_step.total())
        self.training_step.update(gradients)
        self.training_step.end()

    def _local_gradients(self, present: Sequence[bool]) -> dict[int, Tensor]:
        """This rank's part of every gradient that is to be stepped by; zeros where only other ranks have one."""
        gradients = {}
        for index in self.holdings.trained:
            one = self.holdings.placed[index]
            if present[index] and not isinstance(one.layout, Elsewhere):
                gradient = one.local_gradient()
                gradients[index] = torch.zeros_like(one.local()) if gradient is None else gradient
        return gradients

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
        self.training_step.measure(self._local_gradients(present), norm_as_clipping(norm_type))
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

    # What there is to see -----------------------------------------------------------------------------------------

    def _call_own_method(self, name: str, *args: Any, **keywords: Any) -> Any:
        gradients = self._local_gradients(self.training_step.agree_on_gradients(self._look_at_model(), f"{name}()"))
        return self.training_step.call_own_method(name, args, keywords, gradients)

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
        return audit.route_audit(self.holdings, is_inside_backward=self.inside_backward is not None)

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, counted on the real storages."""
        return self.holdings.state_bytes()

    def placed_parameters(self) -> list[PlacedParameter]:
        """All parameters and where they are stored, in group order."""
        return list(self.holdings.placed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is built: owners and positions are planned over all parameters together."""
        if getattr(self, "_is_built", False):
            raise UnsupportedError(
                "add_param_group after building would change owners and positions in the middle of a run. Pass all "
                "groups when you build: build_optimizer(model, name, params=[{'params': [...]}, ...]). List what is "
                "frozen until later in them too: it has no state before its first gradient."
            )
        super().add_param_group(param_group)


def _build_instances(
    spec: OptimizerSpec,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    placed: Sequence[PlacedParameter],
    slices: Sequence[int],
    plan: Plan,
    rank: int,
) -> tuple[UpstreamInstance | None, list[UpstreamInstance]]:
    """One upstream optimizer for what is stepped on slices, where there is such, and one for each round."""
    local = None
    if slices or not plan.buckets:
        local = UpstreamInstance(spec, groups, {index: placed[index].local().shape for index in slices}, arguments)
    shapes = [{item.index: item.shape for item in bucket.owned[rank]} for bucket in plan.buckets]
    return local, [UpstreamInstance(spec, groups, own, arguments) for own in shapes]


def _without_params(group: Mapping[str, Any]) -> ParamGroup:
    return {key: value for key, value in group.items() if key != "params"}
