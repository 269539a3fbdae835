"""``ZeroOptimizer``: the inner optimizer that DeepSpeed wraps, with whole tensors where upstream needs them.

DeepSpeed builds its wrapper around an optimizer that holds the model's parameters, swaps its ``params`` for flat
partitions, and calls ``step()`` once for each of them. This class finds the original parameters inside the partitions
(``layouts.detect_zero``) and hands each call to one ``DistributedOptimizer`` over the slices of that call. What other
calls step are ghosts there, so that every upstream instance steps once a training step and counts as in one process.
An optimizer that needs all gradients at once is one ``DistributedOptimizer`` over all calls (``gathered_calls``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.building.verdicts import with_verdict
from dist_optim.errors import (
    CheckpointError,
    ParameterError,
    StateDictError,
    StepFailedError,
    UnsupportedError,
    WrongModeError,
)
from dist_optim.exchange.plan import Plan
from dist_optim.integrations.deepspeed.before_step import tell_before_steps
from dist_optim.integrations.deepspeed.checkpoint import hold_averaged_weights
from dist_optim.integrations.deepspeed.checkpoint_files import fail_together
from dist_optim.integrations.deepspeed.checkpoint_view import ZeroView
from dist_optim.integrations.deepspeed.gathered_calls import GatheredCalls
from dist_optim.integrations.deepspeed.parts import group_of, places_in, where_it_is
from dist_optim.integrations.deepspeed.push_weights import push_weights
from dist_optim.integrations.deepspeed.schedules import feeds_wrong_metric
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.detect_zero import (
    Call,
    check_slices,
    read_calls,
    with_reachable_groups,
    wrapper_kind,
)
from dist_optim.ranks.agreement import host_group
from dist_optim.ranks.together import together
from dist_optim.specs.composed import OPTIM
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping.audit import route_audit
from dist_optim.stepping.division import Division, divide, needs_all_gradients, starting_values
from dist_optim.stepping.gradients import GradientSamples
from dist_optim.stepping.group_values import is_same
from dist_optim.stepping.growing import REMEDY
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.stepping.presence import PartOfAgreement, StepAgreement, hyperparameters_of
from dist_optim.verifying.shadow import VerifiedSteps, refuse_closures

__all__ = ["GROUP_NUMBER", "ZeroOptimizer"]

GROUP_NUMBER = "dist_optim_group"
"""Key in the param groups that DeepSpeed sees: which of our groups it is (DeepSpeed drops empty ones)."""


class ZeroOptimizer(Optimizer):
    """An unmodified upstream optimizer under DeepSpeed; made by ``dist_optim.integrations.deepspeed``.

    ``param_groups`` are the ones that DeepSpeed and its schedules see; changing ``lr`` there takes effect at the next
    step. ``step`` is called by DeepSpeed. ``train`` and ``eval`` swap weights, on all ranks together, and put them into
    the model.

    Args:
        spec: The optimizer.
        groups: Param groups of the unwrapped model; ``params`` lists ``PlacedParameter``, frozen ones included.
        arguments: Constructor keywords for upstream.
        print_audit: Whether rank 0 prints the route audit when the engine is known.
        rank_timeout_s: See ``ranks.liveness.watch_ranks``.
        independent: See ``dist_optim.build_optimizer``.
        verify_steps: The same.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: Sequence[ParamGroup],
        arguments: Mapping[str, Any],
        *,
        print_audit: bool = True,
        rank_timeout_s: float | None = None,
        independent: bool | None = None,
        verify_steps: int = 0,
    ) -> None:
        self.spec = spec
        self.coverage: str | None = None  # of the audit
        self._num_verified = verify_steps
        self.verified_steps: VerifiedSteps | None = None
        self._independent = independent
        self.print_audit = print_audit
        self.rank_timeout_s = rank_timeout_s
        self._groups = list(groups)
        # Of matrices that are parts of one parameter, the parameter's name: the engine's.
        self._names = {placed.fqn: placed.whole().fqn for group in groups for placed in group["params"]}
        self._arguments = dict(arguments)
        self._engine_calls: list[Call] = []
        self._calls: list[Call] = []  # of the parts: the engine's, or all of them as one
        self._gathered: GatheredCalls | None = None
        self._parts: list[DistributedOptimizer] = []
        self._engine: Any = None
        self._agreement = StepAgreement(None)
        self._samples: GradientSamples | None = None  # where every rank holds every gradient: at stage 0
        self._touched_in: dict[str, int] = {}  # name -> the engine's step in which backward last gave it a gradient
        self._had_gradient: set[str] = set()
        self._present: set[str] = set()
        self.training_weights: list[dict[str, Tensor]] | None = None  # set aside while the engine saves averaged ones
        # DeepSpeed flattens what it is given: frozen parameters are ours to remember.
        outer: list[ParamGroup] = []
        for number, group in enumerate(groups):
            trained = list({id(one.parameter): one.parameter for one in group["params"] if one.is_trained}.values())
            if trained:
                outer.append({**spec.values_in(group, arguments), "params": trained, GROUP_NUMBER: number})
        if not outer:
            raise ParameterError(f"{spec.name}: the model has no trainable parameter.")
        super().__init__(outer, {})
        # The list that holds every group: DeepSpeed shows one group at a time through ``param_groups``.
        self._outer = list(self.param_groups)
        self._as_built = [{key: group[key] for key in group if key != "params"} for group in self._outer]
        for placed in self._trainable():
            placed.parameter.register_post_accumulate_grad_hook(_marking(weakref.ref(self), placed.fqn))

    @property
    def num_steps(self) -> int:
        """Training steps taken."""
        return self._parts[-1].num_steps if self._parts else 0

    @property
    def is_attached(self) -> bool:
        """Whether the engine's layout is known, so that steps can be taken."""
        return bool(self._parts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once DeepSpeed may have divided the parameters, which it does in ``initialize``, once."""
        if hasattr(self, "_outer"):
            raise UnsupportedError(f"add_param_group: DeepSpeed divides what it is given, once. {REMEDY}")
        super().add_param_group(param_group)

    # Attaching to the engine --------------------------------------------------------------------------------------

    def attach(self, engine: Any) -> None:
        """Read the engine's layout, prove it, and build the upstream optimizers. Collective; once, after initialize.

        Raises:
            UnsupportedLayoutError: The engine's layout is not known, or is not what it seems.
            RanksDisagreeError: Ranks gave different models or arguments.
            DistOptimError: Upstream cannot step one of the tensors.
        """
        if self._engine is engine:
            return
        self._engine = engine
        group = engine.seq_data_parallel_group
        by_group: list[list[tuple[str, nn.Parameter]]] = [
            [(placed.fqn, placed.parameter) for placed in _trained_in(members)] for members in self._groups
        ]
        host_group(group)  # where one has to be made, all ranks make it now, before any of them can fail
        calls = together(
            lambda: read_calls(engine, [members for members in by_group if members]),
            group,
            doing="Reading DeepSpeed's partitions",
            remedy="Use deepspeed 0.19.8, and report the ZeRO options of this run.",
        )
        check_slices(calls, group)
        self._engine_calls = self._calls = with_reachable_groups(calls)
        self._agreement = StepAgreement(group)
        spec = with_verdict(self.spec, self._groups, self._arguments, group, self._independent)
        if spec.verdict is not None and spec.verdict.needs_closure:
            raise UnsupportedError(
                f"{spec.name} evaluates the loss itself, by a closure, for which DeepSpeed has no place. Train under "
                "DDP or FSDP, in a loop that calls optimizer.step(closure); or take an optimizer that needs none."
            )
        shares = [group_of(call) for call in self._calls]
        if needs_all_gradients(spec, self._arguments, shares[0]):
            self._gathered = GatheredCalls(self._engine_calls)
            self._calls, shares = [self._gathered.whole], shares[:1]
        divisions = together(
            lambda: [self._divide(spec, *each) for each in zip(self._calls, shares, strict=True)],
            group,
            doing="Building the optimizer",
        )
        for division in divisions:
            division.agree()
        values = [starting_values(division) for division in divisions]
        self._parts = together(
            lambda: [self._build_part(*each) for each in zip(divisions, values, strict=True)],
            group,
            doing="Building the optimizer",
        )
        for part in self._parts:
            part.share_groups()
        self.defaults.update(self._parts[0].defaults)  # where schedules look for what they move
        replicated = [one for part in self._parts for one in part.holdings.placed if one.layout.is_replicated]
        self._samples = GradientSamples(replicated, group, group) if replicated else None
        self._pull_hyperparameters()
        fail_together(engine)
        tell_before_steps(engine)
        if self._num_verified:
            refuse_closures(spec)
            self.verified_steps = VerifiedSteps(self._parts, self._num_verified, self._show_weights)
        if Trait.WEIGHT_SWAPPING in self.spec.traits:
            hold_averaged_weights(engine, self)

    def _divide(self, spec: OptimizerSpec, call: Call, process_group: dist.ProcessGroup | None) -> Division:
        groups = [{**group, "params": places_in(group["params"], call)} for group in self._groups]
        return divide(
            spec,
            groups,
            self._arguments,
            process_group=process_group,
            all_ranks=self._engine.seq_data_parallel_group,
        )

    def _build_part(self, division: Division, values: dict[int, Tensor] | None) -> DistributedOptimizer:
        return DistributedOptimizer(division, values, agreement=PartOfAgreement(self._agreement))

    def route_audit(self) -> str:
        """Which algorithm got which tensors, and who steps them."""
        every = [part.holdings for part in self._parts]
        owners = {index: owner for held in every for index, owner in held.plan.owners.items()}
        whole = replace(
            every[0],
            placed=tuple(where_it_is(places) for places in zip(*(held.placed for held in every), strict=True)),
            plan=Plan(owners, tuple(bucket for held in every for bucket in held.plan.buckets)),
        )
        return "\n  ".join(line for line in (route_audit(whole), self.coverage) if line)

    # Stepping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure in DeepSpeed
        """Update what DeepSpeed shows in ``param_groups`` now. Collective on all ranks.

        Raises:
            WrongModeError: The optimizer was not attached to the engine, or ``eval()`` was called and ``train()`` not.
            UnsupportedError: The engine would feed its schedule a wrong metric, or clip by a stale gradient.
            HyperparameterError: On all ranks: a param group holds a value that is not allowed.
            RanksDisagreeError: On all ranks: a hyperparameter differs.
            ParameterError: On all ranks: what was frozen in ``deepspeed.initialize`` is trainable now.
            StepFailedError: On all ranks, in the last call of the training step: upstream's step failed on one.
        """
        shown = [live for group in self.param_groups for live in group["params"]]
        if self._engine is None:
            self._refuse_real_gradients(shown)
            return  # DeepSpeed's unfused wrapper takes a step with zero gradients in its constructor
        (number,) = [at for at, call in enumerate(self._engine_calls) if call.is_for(shown[0])]
        if number == 0:
            self._begin_training_step()
            if self.verified_steps is not None:
                self.verified_steps.before_step()
        if self._gathered is None:
            self._step_part(self._calls[number], self._parts[number])
        elif not self._gathered.keep_gradients(number):
            with self._gathered.shown():
                self._step_part(self._gathered.whole, self._parts[0])
        if number == len(self._engine_calls) - 1:
            self._end_training_step()

    def _step_part(self, call: Call, part: DistributedOptimizer) -> None:
        self._show_slices(call, part)
        self._push_hyperparameters(part)
        present = [self._names[placed.fqn] in self._present for placed in part.holdings.placed]
        if self.verified_steps is not None:
            self.verified_steps.take_gradients(self._parts.index(part), part.local_gradients(present))
        part.step_part(present)
        for placed in part.holdings.placed:
            placed.parameter.grad = None

    def _end_training_step(self) -> None:
        num_steps = self.num_steps - 1
        try:
            self._agreement.after(self.spec.name, num_steps)
        except Exception:
            for part in self._parts:
                part.progress.failed_step = num_steps + 1
            self.param_groups = self._outer  # DeepSpeed shows one at a time, and does not come back to the others
            raise
        if self._gathered is not None:  # not before all ranks have come through
            self._gathered.write_model()
        if self.spec.is_undescribed:  # it may write its own hyperparameters
            self._pull_hyperparameters()
        if self.verified_steps is not None:
            self.verified_steps.after_step()

    def _refuse_real_gradients(self, shown: Sequence[Tensor]) -> None:
        if any(live.grad is not None and bool(live.grad.any()) for live in shown):
            raise WrongModeError(
                f"{self.spec.name}: step() was called before the optimizer knew its engine. Call "
                "optimizer.attach(engine) right after deepspeed.initialize, or call "
                "dist_optim.integrations.deepspeed.register() before it and name the optimizer in the JSON."
            )

    def _begin_training_step(self) -> None:
        """Agree on which parameters got a gradient: DeepSpeed itself shows zeros, or at stage 3 a stale gradient."""
        if reason := self.why_not_saved():  # on all ranks alike; DeepSpeed adds to the gradients of the failed step
            raise StepFailedError(f"{self.spec.name}: no step follows one that failed. {reason}")
        if self.num_steps == 0:
            _refuse_metric_schedule(self._engine)
        names = [placed.fqn for placed in self._trainable()]
        now = self._engine.global_steps
        touched = [self._touched_in.get(name) == now for name in names]
        held = self._parts[0].holdings
        present = self._agreement.before(
            names,
            touched,
            [False] * len(names),
            hyperparameters_of(self._outer, held.pushed_keys),
            self._sampled(),
            problem=self._parts[0].training_step.wrong_mode()
            or self._parts[0].problem_in_groups(self._written())
            or self._unfrozen(),
        )
        self._present = {name for name, is_present in zip(names, present, strict=True) if is_present}
        stale = sorted(self._had_gradient - self._present)
        if stale and self._engine.gradient_clipping() > 0 and _keeps_stale_gradients(self._engine):
            raise UnsupportedError(
                f"{stale[0]!r} got no gradient in this step. ZeRO-3 of deepspeed 0.19 keeps its last one and counts it "
                'in the norm that it clips by. Set "gradient_clipping": 0.0, use ZeRO-2, or freeze the parameter.'
            )
        self._had_gradient |= self._present

    def _written(self) -> dict[int, ParamGroup]:
        """DeepSpeed's groups, without what has the value of the build: some of it upstream has replaced by another."""
        kept = self._parts[0].holdings.pushed_keys | {OPTIM}
        every = zip(self._outer, self._as_built, strict=True)
        return {
            outer[GROUP_NUMBER]: {
                key: value
                for key, value in outer.items()
                if key in kept or key not in built or not is_same(built[key], value)
            }
            for outer, built in every
        }

    def _unfrozen(self) -> ParameterError | None:
        every = (placed for group in self._groups for placed in group["params"])
        name = next((self._names[one.fqn] for one in every if one.parameter.requires_grad and not one.is_trained), None)
        if name is None:
            return None
        return ParameterError(
            f"Parameter {name!r} is trainable now, and was frozen (requires_grad=False) in deepspeed.initialize, which "
            "divides what is trainable then, so that nobody steps it. Let it be trainable there, and freeze it after "
            "that; or leave it frozen."
        )

    def _sampled(self) -> Sequence[int | None]:
        """Digests of gradients that all ranks hold: they differ when the engine has not reduced them."""
        if self._samples is None:
            return ()
        self._present = {placed.fqn for placed in self._trainable()}  # as the engine has them, zeros included
        for call, part in zip(self._calls, self._parts, strict=True):
            self._show_slices(call, part)
        return self._samples.take(self.num_steps)

    def note_gradient(self, name: str) -> None:
        """Backward has given this parameter a gradient, in the engine's present step."""
        self._touched_in[name] = getattr(self._engine, "global_steps", 0)

    def _show_slices(self, call: Call, part: DistributedOptimizer) -> None:
        """Point the part's parameters at the engine's current storage, and give them this step's gradients."""
        for name, placed in self._by_name(part).items():
            parameter, is_present = placed.parameter, name in self._present
            if name in call.slices:
                parameter.data = call.slices[name].weight()
                parameter.grad = call.slices[name].gradient() if is_present else None
            elif placed.is_trained:
                parameter.grad = torch.empty_like(parameter) if is_present else None

    def _by_name(self, part: DistributedOptimizer) -> dict[str, PlacedParameter]:
        """The part's parameters by the engine's names; of a stack any matrix, which has the parameter of all."""
        return {self._names[placed.fqn]: placed for placed in part.holdings.placed}

    def _show_weights(self) -> None:
        """Point the parameters of all parts at the engine's current storage."""
        for call, part in zip(self._calls, self._parts, strict=True):
            for name, placed in self._by_name(part).items():
                if name in call.slices:
                    placed.parameter.data = call.slices[name].weight()

    def _push_hyperparameters(self, part: DistributedOptimizer) -> None:
        for outer in self._outer:
            inner = part.param_groups[outer[GROUP_NUMBER]]
            inner.update({key: outer[key] for key in self._shared(inner) & outer.keys()})

    def _pull_hyperparameters(self) -> None:
        """Show in DeepSpeed's groups what upstream's hold; what upstream counts there differs from call to call."""
        for outer in self._outer:
            inner = self._parts[0].param_groups[outer[GROUP_NUMBER]]
            outer.update({key: inner[key] for key in self._shared(inner)})

    def _shared(self, inner: ParamGroup) -> set[str]:
        """Keys that DeepSpeed's groups have too: hyperparameters, and where nobody described the class all of them."""
        is_two_way = self.spec.is_undescribed_in(inner)
        return set(inner) - {"params"} if is_two_way else inner.keys() & self._parts[0].holdings.pushed_keys

    def _trainable(self) -> list[PlacedParameter]:
        return [placed for group in self._groups for placed in _trained_in(group)]

    # Weights for evaluation ---------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the training weights into the model. Collective where the optimizer swaps weights; otherwise nothing."""
        self._swap_weights("train")

    def eval(self) -> None:
        """Put the averaged weights into the model, as schedule-free methods evaluate and export them. Collective."""
        self._swap_weights("eval")

    @torch.no_grad()
    def _swap_weights(self, mode: str) -> None:
        before = [part.mode for part in self._parts]
        for call, part in zip(self._calls, self._parts, strict=True):
            self._show_slices(call, part)
            getattr(part, mode)()
        if before != [part.mode for part in self._parts]:
            if self.verified_steps is not None:
                self.verified_steps.swap(mode)
            push_weights(self._engine)

    @property
    def mode(self) -> str:
        """``"train"``, or ``"eval"`` while the averaged weights are in place."""
        return self._parts[0].mode if self._parts else "train"

    def copied_weights(self) -> list[dict[str, Tensor]]:
        """Copies of this rank's slices, call by call."""
        return [{name: part.weight().clone() for name, part in call.slices.items()} for call in self._calls]

    def write_weights(self, weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Put slices that ``copied_weights`` returned back in place; the model itself is not touched."""
        for call, saved in zip(self._calls, weights, strict=True):
            for name, part in call.slices.items():
                part.weight().copy_(saved[name])

    # State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the state, by parameter name; DeepSpeed stores it in this rank's checkpoint file."""
        for part in self._parts:
            self._push_hyperparameters(part)
        own: dict[str, Any] = {"dist_optim": 1, "calls": [part.state_share() for part in self._parts]}
        return own if self.training_weights is None else {**own, "training_weights": self.training_weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Install what ``state_dict`` returned on this rank.

        Raises:
            StateDictError: It belongs to another optimizer, other parameters, another rank or another ZeRO stage.
        """
        saved = state_dict.get("calls")
        if saved is None or len(saved) != len(self._parts):
            raise StateDictError(
                f"The checkpoint holds the state of {'no' if saved is None else len(saved)} step() calls of "
                f"dist_optim, this engine makes {len(self._parts)}. Load it with the optimizer, the ZeRO stage, the "
                "sub_group_size and the param groups that saved it."
            )
        for part, share in zip(self._parts, saved, strict=True):
            part.load_state_dict(share)
        self.training_weights = state_dict.get("training_weights")
        self._pull_hyperparameters()

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""
        return sum(part.optimizer_state_bytes() for part in self._parts)

    def clipping(self) -> tuple[Any, float] | None:
        """The norm of all gradients in the engine's last step, and what it clips to; None where it does not clip."""
        norm, bound = self._engine.get_global_grad_norm(), self._engine.gradient_clipping()
        return None if norm is None or not bound else (norm, float(bound))

    def why_not_saved(self) -> str:
        """Why what is held now must not be saved, and what to do; empty where it may be."""
        failed = self._parts[0].progress.failed_step if self._parts else None
        if failed is None:
            return ""
        return (
            f"Step {failed} failed after a part of its updates was made: the weights are half of a step, and DeepSpeed "
            "keeps its gradients. Call deepspeed.initialize anew, load the last checkpoint, and go on from there."
        )

    # What checkpoints of dist_optim see -----------------------------------------------------------------------------

    def checkpoint_view(self) -> ZeroView:
        """See ``checkpoint.engine_view``."""
        if not self.is_attached:
            raise CheckpointError(
                f"{self.spec.name}: the optimizer does not know its engine yet. Save and load after "
                "deepspeed.initialize."
            )
        return ZeroView(self, self._engine)

    def trained_in_model(self) -> list[PlacedParameter]:
        """The model's own parameters that are trained, whole or as stage 3 leaves them."""
        return self._trainable()

    def show_to_parts(self) -> None:
        """Give the parts the engine's present storage of the weights, and DeepSpeed's hyperparameters."""
        for call, part in zip(self._calls, self._parts, strict=True):
            for name, placed in self._by_name(part).items():
                if name in call.slices:
                    placed.parameter.data = call.slices[name].weight()
            self._push_hyperparameters(part)

    def show_from_parts(self) -> None:
        """Take over the parts' hyperparameters, after they have been loaded; the engine counts its steps anew."""
        self._touched_in.clear()
        self._pull_hyperparameters()

    def parts(self) -> list[DistributedOptimizer]:
        """The optimizers underneath: one for each ``step()`` call of a training step, or one for all of them."""
        return list(self._parts)


def _trained_in(group: ParamGroup) -> list[PlacedParameter]:
    """The trained parameters of a group as the model has them, a stack once."""
    wholes = (placed.whole() for placed in group["params"] if placed.is_trained)
    return list({placed.fqn: placed for placed in wholes}.values())


def _marking(optimizer: weakref.ref[ZeroOptimizer], name: str) -> Callable[[Tensor], None]:
    """A hook on a parameter, which may outlive the optimizer."""

    def note(_: Tensor) -> None:
        living = optimizer()
        if living is not None:
            living.note_gradient(name)

    return note


def _keeps_stale_gradients(engine: Any) -> bool:
    return wrapper_kind(engine) == "DeepSpeedZeroOptimizer_Stage3"


def _refuse_metric_schedule(engine: Any) -> None:
    if feeds_wrong_metric(engine):
        raise UnsupportedError(
            f"The engine steps {type(engine.lr_scheduler).__name__} itself, and gives it the batch size as its metric. "
            "Do not pass it to deepspeed.initialize: call dist_optim.build_scheduler(engine.optimizer, ...) after it, "
            "and its step(metric) after evaluating; or name it in the JSON's scheduler section."
        )
