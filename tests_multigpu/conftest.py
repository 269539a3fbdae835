"""One pytest run on several ranks: ``torchrun --nproc_per_node N -m pytest tests_multigpu``.

Every rank runs every test. After each phase (setup, call, teardown) the ranks compare outcomes, so they enter the next
phase together or not at all: a failure on one rank is a failure on all, and rank 0's report shows it with the rank's
name and traceback. Where ranks may have parted inside a collective, the process group is probed, and the run stops with
a non-zero exit code if it is broken. Without torchrun it is an ordinary pytest run with a world size of 1.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import sys
from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from rank_agreement import TIMEOUT_VARIABLE, Outcome, RankLostError, Ranks, agreed_outcome, first_difference

STOPPED = pytest.ExitCode.INTERRUPTED  # not zero, and pytest still prints the failures so far
DEFAULT_TIMEOUT_S = 60.0

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """This rank's device: its own GPU where every local rank has one, else the CPU."""
    return request.config.stash[PLUGIN].ranks.device


class RankAgreement:
    """The pytest plugin that keeps the ranks together."""

    def __init__(self, config: pytest.Config) -> None:
        self._stderr = os.fdopen(os.dup(2), "w", buffering=1)  # pytest captures descriptor 2 while a test runs
        self.ranks = Ranks(float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S)))
        self._collection_errors: list[str] = []
        self._suspicion = ""  # why the process group may be broken; the same on every rank
        self._broken = ""  # why the run cannot go on
        self._exit_status = 0
        self._terminates_with_stack()
        if self.ranks.rank > 0:
            self._silence_report(config)
        self.ranks.join_process_group()

    def _terminates_with_stack(self) -> None:
        """When the launcher ends this rank because another one failed, show where this one was."""
        if self.ranks.world_size > 1:
            faulthandler.register(signal.SIGTERM, file=self._stderr, all_threads=False, chain=True)

    def _silence_report(self, config: pytest.Config) -> None:
        """Rank 0 reports for all; hooks still expect some reporter to be there."""
        loud = config.pluginmanager.get_plugin("terminalreporter")
        if loud is not None:
            config.pluginmanager.unregister(loud)
            config.pluginmanager.register(type(loud)(config, io.StringIO()), "terminalreporter")

    def _say(self, text: str) -> None:
        print(f"[rank {self.ranks.rank}] {text}", file=self._stderr)

    def _stop(self, reason: str) -> None:
        self._broken = reason
        pytest.exit(reason, returncode=STOPPED)

    # Collection: the same tests everywhere, or none at all.

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._collection_errors.append(report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        own = {"tests": [item.nodeid for item in session.items], "errors": self._collection_errors}
        try:
            collected = [json.loads(text) for text in self.ranks.exchange(json.dumps(own))]
        except RankLostError as error:
            self._stop(f"during collection, {error}")
        failed = [(rank, one["errors"]) for rank, one in enumerate(collected) if one["errors"]]
        if 0 < len(failed) < self.ranks.world_size:
            rank, errors = failed[0]
            pytest.exit(f"collection failed on rank {rank} only:\n" + "\n".join(errors), returncode=STOPPED)
        if difference := first_difference([one["tests"] for one in collected]):
            pytest.exit(difference, returncode=STOPPED)

    # Tests: one outcome per phase, the same on every rank.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self._broken or self.ranks.world_size == 1:
            return report
        own = Outcome(what=f"{report.nodeid} ({report.when})", outcome=report.outcome, text=_text_of(report))
        if report.failed and self.ranks.rank > 0:
            self._say(f"FAILED {own.what}")  # in case nobody is left to report it
        try:
            outcomes = self.ranks.exchange_outcomes(own)
        except RankLostError as error:
            self._broken = f"in {own.what}, {error}"
            _fail(report, f"{error}\nHere, on rank {self.ranks.rank}, it {own.outcome}. {own.text}".rstrip())
            if self.ranks.rank > 0:
                self._say(report.longreprtext)
            return report
        outcome, text = agreed_outcome(outcomes)
        if outcome == "failed":
            self._suspicion = text.splitlines()[0]
            _fail(report, text)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if self._broken:
            self._stop(self._broken)
        if self._suspicion and self.ranks.world_size > 1:
            self._stop_unless_healthy(item)
        return result

    def _stop_unless_healthy(self, item: pytest.Item) -> None:
        try:
            healthy = self.ranks.group_is_healthy()
        except RankLostError as error:
            self._stop(f"after {item.nodeid} ({self._suspicion}), {error}")
        if not healthy:
            self._stop(f"{item.nodeid} {self._suspicion} and left the process group broken; no further test can run")
        self._suspicion = ""

    # The end.

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        if self.ranks.rank > 0:
            self._say(f"stopped: {excinfo.value}")

    def pytest_internalerror(self, excrepr: object) -> None:
        if self.ranks.rank > 0:
            self._say(f"internal error: {excrepr}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._exit_status = int(exitstatus)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self._broken:
            # Leaving in order would wait for collectives that nobody will ever complete.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._exit_status or STOPPED)
        dist.destroy_process_group()


PLUGIN = pytest.StashKey[RankAgreement]()


@pytest.hookimpl(trylast=True)  # after the terminal reporter exists
def pytest_configure(config: pytest.Config) -> None:
    """Join the other ranks, once, before anything is collected."""
    plugin = RankAgreement(config)
    config.stash[PLUGIN] = plugin
    config.pluginmanager.register(plugin, "rank-agreement")


def _text_of(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    captured = [f"-- {title} --\n{content}" for title, content in report.sections if report.failed and content]
    return "\n".join([report.longreprtext, *captured])


def _fail(report: pytest.TestReport, text: str) -> None:
    report.outcome = "failed"
    report.longrepr = text
    report.sections = []  # the captured output is part of the text, under its rank's name
