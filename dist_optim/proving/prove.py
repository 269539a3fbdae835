"""``prove``: may the tensors of an optimizer that nobody described be stepped by different ranks?

Shown in this order, cheapest first: that it steps at all, and whether it wants a closure; that no value of one tensor
flows into another (``flow.py``), nor by way of Python (``reads.py``), and that nothing is random; that tensors stepped
apart end on the bits of those stepped together (``apart.py``). What no run has executed is listed (``reached.py``).
"""

from __future__ import annotations

import io
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_optim.errors import DistOptimError, HyperparameterError, UnsupportedError
from dist_optim.generators import generators_kept, seed_generators
from dist_optim.proving.apart import checkpoints_of, first_difference_apart, who_sees_other_gradients
from dist_optim.proving.cache import remembered
from dist_optim.proving.closures import Closures, closures_of
from dist_optim.proving.flow import Flow, flow_of
from dist_optim.proving.reached import Reached
from dist_optim.proving.reads import who_follows
from dist_optim.proving.saving import why_not_saved
from dist_optim.proving.scenario import DROPPED_IN_ORDER, LATE, Scenario, scenarios_of
from dist_optim.proving.subject import Context, Snapshot, StepFailed, Subject, run
from dist_optim.proving.trace import CommunicatesError, numbers
from dist_optim.ranks.at_work import at_work
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.verdict import Ghosts, Verdict

__all__ = ["prove"]

EVERY_KIND: tuple[Ghosts, ...] = ("none", "empty", "with gradients")
ENOUGH = LATE + 30
"""The step in which a run that has found something ends: absent gradients have been tried by then."""
LEAST = 8
"""Steps that a schedule must reach to show something."""


def prove(
    spec: OptimizerSpec,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    *,
    kinds: Sequence[Ghosts] = EVERY_KIND,
) -> Verdict:
    """Say whether the tensors of this class, with these arguments, are independent of each other.

    Local to the process and deterministic: every rank comes to the same verdict. Takes seconds; verdicts are kept
    (``cache.py``). Global random states are left as they were.

    Args:
        spec: An optimizer without a description.
        groups: The param groups that it will get; ``params`` are placed parameters.
        arguments: Its constructor's keywords.
        kinds: What may stand for tensors that are stepped elsewhere, in the order in which it is tried.

    Raises:
        UnsupportedError: It cannot be stepped at all.
        HyperparameterError: Its constructor refuses these arguments.
    """
    return remembered(spec, groups, arguments, kinds, lambda: _prove(spec, groups, arguments, kinds))


def _prove(
    spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any], kinds: Sequence[Ghosts]
) -> Verdict:
    with at_work(f"trying whether the tensors of {spec.name} are independent of each other"), _undisturbed():
        proof = _Proof(spec, arguments, kinds)
        try:
            return proof.with_saving(proof.verdict(scenarios_of(groups)))
        except CommunicatesError as error:
            return proof.refused(str(error))
        except StepFailed as failure:
            if _is_in_distributed(failure.error):
                return proof.refused(str(failure))
            raise _cannot_be_tried(spec, arguments, failure) from failure.error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing of the proof is seen outside: no random state moves, nothing is printed, no warning is shown.

    Nor is anything compiled: what a class lets ``torch.compile`` do takes minutes, and is traced as it is written.
    """
    eager = torch.compiler.set_stance("force_eager")
    shown = io.StringIO()
    with generators_kept(), eager, warnings.catch_warnings(), redirect_stdout(shown), redirect_stderr(shown):
        warnings.simplefilter("ignore")
        seed_generators(0)
        yield


@dataclass
class _Tried:
    """A scenario as far as the class can take it, traced and not."""

    scenario: Scenario
    flow: Flow
    together: dict[int, Snapshot] = field(default_factory=dict)


class _Proof:
    """One proof in progress."""

    def __init__(self, spec: OptimizerSpec, arguments: Mapping[str, Any], kinds: Sequence[Ghosts]) -> None:
        self.spec, self.arguments, self.kinds = spec, arguments, kinds
        self.reached = Reached(spec.own_class())
        self.evidence: dict[str, Any] = {"steps": {}, "left out": [], "operations": 0, "host reads": {}, "apart": {}}
        self.known: dict[str, Any] = {}
        self.tried: Scenario | None = None
        """What the class can take, of the first scenario."""

    @property
    def around(self) -> Context:
        return self.reached.recording

    def refused(self, what: str) -> Verdict:
        """It communicates by itself."""
        return self._coupled(
            "it communicates by itself",
            refusal=f"{self.spec.name} communicates by itself ({what}), and dist_optim has its own exchange: both at "
            "once would wait for each other, or average twice. Use the variant of this class for one process.",
        )

    def _coupled(self, reason: str, **more: Any) -> Verdict:
        return Verdict(
            name=self.spec.name, is_independent=False, reason=reason, evidence=self.evidence, **self.known | more
        )

    def verdict(self, scenarios: Sequence[Scenario]) -> Verdict:
        """Run all of it, up to the first thing that speaks against independence."""
        try:
            closures = closures_of(self.spec, scenarios[0].without(set(DROPPED_IN_ORDER)), self.arguments)
        except StepFailed as failure:
            closures_of(self.spec, scenarios[-1], self.arguments)  # raises where it takes no true sizes either
            self.evidence["left out"].append(f"all of it: {failure}")
            return self._coupled(f"it steps no tiny tensors, so that nothing could be shown ({failure})")
        self.known |= {"needs_closure": closures.is_needed, "evaluations": closures.evaluations}
        if closures.is_needed or closures.evaluations > 1:
            return self._of_closures(closures)
        if not closures.evaluations:
            scenarios = [scenario.without({"closure"}) for scenario in scenarios]
        tried: list[_Tried] = []
        for scenario in scenarios:
            tried += self._traced(scenario, is_first=not tried)
            reason = self._why_coupled(tried[-1])
            if reason:
                return self._coupled(reason)
        if not tried[0].flow.has_moved:
            return self._coupled("no weight moves in the proof, so that nothing is shown")
        for one in tried:
            subject = Subject(self.spec, one.scenario, self.arguments, around_step=self.around)
            one.together = run(subject, list(one.flow.snapshots))
        return self._of_runs(tried)

    def with_saving(self, verdict: Verdict) -> Verdict:
        """The verdict; a refusal where the class would be trained, and its checkpoint would be another run."""
        if self.tried is None or verdict.refusal:
            return verdict
        why = why_not_saved(self.spec, self.tried, self.arguments, self.around)
        self.evidence["saving"] = why
        if not why:
            return verdict
        return replace(
            verdict,
            refusal=f"{self.spec.name} trains, but a run that was saved and loaded would not be the same run: {why}. "
            "Register an OptimizerSpec whose driver stores what it keeps (docs/adding-an-optimizer.md).",
        )

    def _of_closures(self, closures: Closures) -> Verdict:
        if closures.draws:
            self.known["draws"] = True
        if closures.is_needed:
            return self._coupled("its step() needs a closure")
        return self._coupled(f"its step() evaluates the closure {closures.evaluations} times")

    def _of_runs(self, tried: Sequence[_Tried]) -> Verdict:
        known: set[str] = set()
        for one in tried:
            args = (self.spec, one.scenario, self.arguments)
            is_new = not one.flow.found.reads.keys() <= known
            reason = who_follows(*args, one.flow, self.around) if is_new else ""
            known |= one.flow.found.reads.keys()
            reason = reason or who_sees_other_gradients(*args, one.together, self.around)
            if reason:
                return self._coupled(f"tensors depend on each other: {reason} ({one.scenario.name})")
        ghosts = next((kind for kind in self.kinds if not self._difference_apart(tried, kind)), None)
        if ghosts is None:
            first = self.evidence["apart"][self.kinds[0]]
            return self._coupled(f"stepped apart, tensors move otherwise than together: {first}")
        steps = sum(self.evidence["steps"].values())
        return Verdict(
            name=self.spec.name,
            is_independent=True,
            reason=f"no value flows between tensors in {steps} traced steps, and stepped apart they end on equal bits",
            ghosts=ghosts,
            unreached=self.reached.unreached(),
            evidence=self.evidence,
            **self.known,
        )

    def _traced(self, scenario: Scenario, *, is_first: bool) -> list[_Tried]:
        """The scenario, traced; without what the class fails at in one process too. Empty where too little is left."""
        while True:
            flow = self._flow(scenario)
            failure = flow.failure
            if failure is None:
                break
            features = scenario.steps[failure.at].features
            dropped = next((feature for feature in DROPPED_IN_ORDER if feature in features), None)
            what = f"step {failure.at} and later" if dropped is None else dropped
            self.evidence["left out"].append(f"{what} ({scenario.name}): {failure}")
            if dropped is not None:
                scenario = scenario.without({dropped})
            elif failure.at >= LEAST and flow.snapshots:
                scenario = scenario.until(failure.at)
                break
            elif is_first:
                raise failure
            else:
                return []
        self.evidence["steps"][scenario.name] = len(scenario.steps)
        self.tried = self.tried or scenario
        return [_Tried(scenario, flow)]

    def _flow(self, scenario: Scenario) -> Flow:
        flow = flow_of(
            self.spec,
            scenario,
            self.arguments,
            checkpoints_of(scenario),
            around_step=self.around,
            is_enough=lambda flow, at: at >= ENOUGH and bool(flow.found.coupled or flow.found.draws),
        )
        self.evidence["operations"] += flow.found.num_operations
        for where, tags in flow.found.reads.items():
            self.evidence["host reads"].setdefault(where, numbers(tags))
        self.known["steps_absent"] = self.known.get("steps_absent", False) or flow.steps_absent
        return flow

    def _why_coupled(self, tried: _Tried) -> str:
        found = tried.flow.found
        self.known["draws"] = bool(found.draws)
        if found.coupled:
            self.evidence["coupled"] = found.coupled
            return f"tensors depend on each other: {found.coupled[0]} ({tried.scenario.name})"
        if found.draws:
            return f"it draws random numbers, in an order that sharding would change: {found.draws}"
        return ""

    def _difference_apart(self, tried: Sequence[_Tried], kind: Ghosts) -> str:
        difference = ""
        for one in tried:
            args = (self.spec, one.scenario, self.arguments)
            difference = difference or first_difference_apart(*args, one.together, kind, self.around)
        self.evidence["apart"][kind] = difference
        return difference


def _is_in_distributed(error: BaseException) -> bool:
    """Whether an error comes from torch's collectives, which have no process group here."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("torch.distributed.") for frame, _ in frames)


def _cannot_be_tried(spec: OptimizerSpec, arguments: Mapping[str, Any], failure: StepFailed) -> Exception:
    error = failure.error
    if isinstance(error, DistOptimError):
        return error
    if failure.at < 0 and isinstance(error, (ValueError, TypeError)):
        return HyperparameterError(
            f"{spec.name}: upstream's {spec.load_class().__name__} refuses its arguments: {error}. "
            f"They were: {', '.join(f'{key}={value!r}' for key, value in arguments.items())}."
        )
    return UnsupportedError(
        f"{spec.name} cannot be tried out: stepping tiny tensors fails, without a closure and with one, with "
        f"{type(error).__name__}: {error}. An optimizer whose step() needs more than gradients cannot be distributed. "
        "Otherwise register an OptimizerSpec that describes it."
    )
