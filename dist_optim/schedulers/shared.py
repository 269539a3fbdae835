"""``MetricScheduler``: a schedule that follows a metric, decided once for all ranks.

One decision goes like this. Every rank says what it has: its metric, its rates, how many decisions it has seen. From
that each computes the same reduced metric, or raises the same error. The first rank lets upstream's schedule step; its
new state and rates are every rank's. Last, all say again which rates they hold, and raise where one differs.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dist_optim.errors import MetricError, RanksDisagreeError, ScheduleError, StateDictError
from dist_optim.ranks.agreement import assert_ranks_equal, gather_objects, own_rank
from dist_optim.ranks.meeting import meet
from dist_optim.ranks.together import together
from dist_optim.schedulers.decisions import DecisionLog, Row, describe_decision, make_row
from dist_optim.schedulers.limits import learning_rates, set_learning_rates
from dist_optim.schedulers.metric import Contribution, Reduced, read_metric, reduce_metric

__all__ = ["MetricScheduler"]

_NOT_GIVEN = object()
_KEYS = ("schedule", "upstream", "learning_rates", "decisions")


@dataclass(frozen=True, slots=True)
class _Report:
    """What one rank says before a decision."""

    number: int
    rates: list[float]
    contribution: Contribution | None


class MetricScheduler:
    """Upstream's GreedyLR, ReduceLROnPlateau or the like, obeyed by all ranks; made by ``build_scheduler``.

    It is no ``LRScheduler``, so that ``accelerator.prepare`` leaves it as it is: accelerate's wrapper would take each
    metric once for every process.

    Args:
        schedule: Upstream's schedule. It steps on the group's first rank alone; the others receive its state.
        name: For messages.
        metric_from_rank: Take this rank's metric; None for the mean over the ranks that have one.
        on_nonfinite: ``"ignore"`` ranks whose metric is NaN or infinite, or ``"raise"``.
        log_path: Where the group's first rank writes its decisions, one JSON line each.
        stepped_by_engine: An engine or a trainer calls ``step()`` after every batch, without a metric: do nothing then.
        process_group: The ranks that train together; the default group when None.
    """

    def __init__(
        self,
        schedule: Any,
        name: str,
        *,
        metric_from_rank: int | None = None,
        on_nonfinite: str = "ignore",
        log_path: str | os.PathLike[str] | None = None,
        stepped_by_engine: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.scheduler = schedule
        self.optimizer = schedule.optimizer
        self.name = name
        self.stepped_by_engine = stepped_by_engine
        self.process_group = process_group
        self._from_rank = metric_from_rank
        self._on_nonfinite = on_nonfinite
        self._decides = own_rank(process_group) == 0
        self._log = DecisionLog(log_path if self._decides else None)

    @property
    def decisions(self) -> list[Row]:
        """Every decision so far, the same on all ranks; the rows of the log."""
        return [copy.deepcopy(row) for row in self._log.rows]

    def get_last_lr(self) -> list[float]:
        """The rate of every param group, as it is now."""
        return learning_rates(self.optimizer)

    def step(self, metrics: Any = _NOT_GIVEN, *, at_step: int | None = None, absence: str = "") -> Row | None:
        """Decide on the learning rate. Collective: all ranks call it, after the same evaluation.

        Args:
            metrics: This rank's metric: a number, a tensor of one element, a pair (sum, count) that is weighed by its
                count, or None where this rank has none.
            at_step: The training step for the log; what the optimizer has counted when None.
            absence: What an error should say of why no rank has a metric.

        Returns:
            The decision, as the log has it and the same on all ranks; None for the call of an engine.

        Raises:
            MetricError: On all ranks: no rank has a metric, one gave something that is none, or (on request) NaN.
            RanksDisagreeError: On all ranks: their rates or decisions have parted.
            ScheduleError: On all ranks: no metric was passed, or the log cannot be written.
        """
        if metrics is _NOT_GIVEN and self.stepped_by_engine:
            return None
        meet(f"step() of {self.name}", self.process_group)
        reduced = self._agree_on_metric(metrics, absence)
        number, old = len(self._log.rows) + 1, learning_rates(self.optimizer)
        if reduced.metric is None:
            decision = "skipped"
            self._warn_of_nonfinite(reduced)
        else:
            decision = self._decide(reduced.metric)
        row = make_row(number, self._at(at_step), reduced, decision, old, learning_rates(self.optimizer))
        together(
            lambda: self._log.add(row),
            self.process_group,
            doing=f"Logging a decision of {self.name}",
            remedy="Choose another log_path, or none.",
            otherwise=ScheduleError,
        )
        self._assert_rates_equal()
        return copy.deepcopy(row)

    def _agree_on_metric(self, metrics: Any, absence: str) -> Reduced:
        own = together(
            lambda: self._report(metrics),
            self.process_group,
            doing=f"Reading the metric of {self.name}",
            remedy="Pass a number.",
            otherwise=MetricError,
        )
        reports = gather_objects(own, self.process_group)
        for rank, report in enumerate(reports):
            if (report.number, report.rates) != (reports[0].number, reports[0].rates):
                raise RanksDisagreeError(
                    f"Before decision {reports[0].number} of {self.name}, rank 0 has the learning rates "
                    f"{reports[0].rates}; rank {rank} is at decision {report.number} with {report.rates}. Change rates "
                    "on all ranks alike, and load the same checkpoint on all of them."
                )
        return reduce_metric(
            [report.contribution for report in reports],
            from_rank=self._from_rank,
            on_nonfinite=self._on_nonfinite,
            absence=absence,
        )

    def _report(self, metrics: Any) -> _Report:
        if metrics is _NOT_GIVEN:
            raise ScheduleError(
                f"{self.name} follows a metric, and step() was called without one. Call step(metric) after each "
                "evaluation, on all ranks (None on a rank that has none), and not after each batch, or "
                "build it with stepped_by_engine=True where an engine does that."
            )
        return _Report(len(self._log.rows) + 1, learning_rates(self.optimizer), read_metric(metrics))

    def _decide(self, metric: float) -> str:
        """Let upstream step on the first rank, and take over its state and rates on the others."""
        told = together(
            lambda: self._step_upstream(metric) if self._decides else None,
            self.process_group,
            doing=f"The step of {self.name} on the metric {metric!r}",
            remedy="The error that this one comes from is the schedule's own.",
            otherwise=ScheduleError,
        )
        heard = gather_objects(told, self.process_group)[0]
        assert heard is not None
        state, rates, decision = heard
        if not self._decides:
            self.scheduler.load_state_dict(state)
            set_learning_rates(self.optimizer, rates)
        return decision

    def _step_upstream(self, metric: float) -> tuple[dict[str, Any], list[float], str]:
        old = learning_rates(self.optimizer)
        had_best = math.isfinite(getattr(self.scheduler, "best", math.inf))
        self.scheduler.step(metric)
        was_reset = had_best and not math.isfinite(getattr(self.scheduler, "best", math.inf))
        new = learning_rates(self.optimizer)
        return self._upstream_state(), new, describe_decision(old, new, was_reset)

    def _assert_rates_equal(self) -> None:
        rates = learning_rates(self.optimizer)
        assert_ranks_equal(
            f"After decision {len(self._log.rows)} of {self.name}, learning rates differ between ranks",
            [(f"the rate of param group {number}", rate) for number, rate in enumerate(rates)],
            "Something else changes them: let one schedule alone set the rates.",
            self.process_group,
        )

    def _at(self, at_step: int | None) -> int | None:
        counted = getattr(self.optimizer, "num_steps", None) if at_step is None else at_step
        return None if counted is None else int(counted)

    def _warn_of_nonfinite(self, reduced: Reduced) -> None:
        if self._decides:
            warnings.warn(
                f"{self.name} takes no decision: the metric is NaN or infinite on ranks {list(reduced.ignored_ranks)}, "
                "and no rank has another. The learning rate stays as it is.",
                stacklevel=3,
            )

    # State --------------------------------------------------------------------------------------------------------

    def _upstream_state(self) -> dict[str, Any]:
        return copy.deepcopy(self.scheduler.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Upstream's state, the rates and the decisions: plain values, equal on all ranks. Not a collective.

        It loads under any number of ranks and any sharding, and with ``torch.load(weights_only=True)``.
        """
        return {
            "schedule": self.name,
            "upstream": self._upstream_state(),
            "learning_rates": learning_rates(self.optimizer),
            "decisions": self.decisions,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken: counters, rates, decisions, and the file of the log.

        Every rank loads the same; it is not a collective, and the next decision finds out where they did not.

        Raises:
            StateDictError: It belongs to another schedule, or to another number of param groups.
        """
        missing = [key for key in _KEYS if key not in state_dict]
        if missing:
            raise StateDictError(
                f"The state of {self.name} lacks {', '.join(missing)}: it was not saved by this scheduler. A state of "
                f"upstream's own class loads with scheduler.scheduler.load_state_dict(state)."
            )
        if state_dict["schedule"] != self.name:
            raise StateDictError(
                f"The state is of the schedule {state_dict['schedule']!r}, and this one is {self.name!r}. Build the "
                "schedule that the run was saved with."
            )
        num_groups = len(self.optimizer.param_groups)
        if len(state_dict["learning_rates"]) != num_groups:
            raise StateDictError(
                f"The state of {self.name} holds {len(state_dict['learning_rates'])} learning rates, and the optimizer "
                f"has {num_groups} param groups. Build the optimizer with the groups that the run was saved with."
            )
        self.scheduler.load_state_dict(copy.deepcopy(state_dict["upstream"]))
        set_learning_rates(self.optimizer, state_dict["learning_rates"])
        self._log.replace(state_dict["decisions"])
