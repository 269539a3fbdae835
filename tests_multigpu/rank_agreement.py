"""How the ranks of one test run tell each other what happened, over the store and never over the group under test.

A hung or broken process group is what these tests are there to find, so the ranks report through the launcher's
key-value store: each phase of each test has a number, each rank writes its outcome under it and waits, with a timeout,
for the others.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT_VARIABLE = "DIST_OPTIM_TEST_TIMEOUT_S"
MEETING_S = 300.0
"""How long ranks wait for each other at the start: they import for as long as the machine is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank made of one phase of one test."""

    what: str  # the test and the phase, alike on all ranks
    outcome: str  # passed, failed or skipped
    text: str  # the traceback and the captured output of a failure, the reason of a skip


class RankLostError(RuntimeError):
    """A rank did not report in time."""


class Ranks:
    """This process's place among the ranks of the run, and its line to the others.

    Args:
        timeout_s: The process group's timeout; a rank is lost when it has not reported for a little longer than that.
            Before, the ranks wait for each other to start.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.timeout_s = timeout_s
        self.lost_after_s = 1.25 * timeout_s + 2.0  # a rank whose collective timed out still has to report that
        self.health_check_s = min(5.0, timeout_s)
        self.device = self._choose_device()
        self._num_exchanges = 0
        self._store = self._connect()

    def _choose_device(self) -> torch.device:
        """One GPU per local rank where there are enough, else the CPU; the same kind on every rank of a node."""
        if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def _connect(self) -> dist.Store:
        if self.world_size == 1:
            return dist.HashStore()
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))
        store.set(f"started-{self.rank}", "")
        store.wait([f"started-{rank}" for rank in range(self.world_size)], timedelta(seconds=MEETING_S))
        store.set_timeout(timedelta(seconds=self.timeout_s))
        return store

    def join_process_group(self) -> None:
        """Initialise the default process group: NCCL on GPUs, gloo on the CPU."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("process-group", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout_s),
            device_id=self.device if on_gpu else None,
        )

    def exchange(self, own: str) -> list[str]:
        """Return every rank's text, in rank order. All ranks call it the same number of times.

        Raises:
            RankLostError: Some rank did not send its text in time; the message names it.
        """
        self._num_exchanges += 1
        keys = [f"exchange-{self._num_exchanges}-{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], own)
        deadline = time.monotonic() + self.lost_after_s
        texts = []
        for rank, key in enumerate(keys):
            try:
                self._store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
                texts.append(self._store.get(key).decode())
            except RuntimeError as error:
                raise RankLostError(
                    f"rank {rank} did not report within {self.lost_after_s:g} s: it hangs or has died. "
                    f"(Raise {TIMEOUT_VARIABLE} if it is only slow.)"
                ) from error
        return texts

    def exchange_outcomes(self, own: Outcome) -> list[Outcome]:
        """Return every rank's outcome, in rank order; raises as ``exchange`` does."""
        return [Outcome(**json.loads(text)) for text in self.exchange(json.dumps(asdict(own)))]

    def group_is_healthy(self) -> bool:
        """Whether collectives still work on every rank: false when some rank left the others in the middle of one."""
        verdicts = self.exchange("healthy" if self._collectives_work() else "broken")
        return all(verdict == "healthy" for verdict in verdicts)

    def _collectives_work(self) -> bool:
        try:
            if not self._all_reduce_works():
                return False
            # Ranks that parted while making groups count them differently from then on, and would never meet again.
            dist.destroy_process_group(dist.new_group(timeout=timedelta(seconds=self.health_check_s)))
            return True
        except RuntimeError:
            return False

    def _all_reduce_works(self) -> bool:
        total = torch.ones(1, device=self.device)
        work = dist.all_reduce(total, async_op=True)
        deadline = time.monotonic() + self.health_check_s
        # Polled, not waited for: on a broken group a wait would last as long as the group's own timeout.
        while work is not None and not work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return total.item() == self.world_size


def agreed_outcome(outcomes: list[Outcome]) -> tuple[str, str]:
    """Return the outcome that all ranks report, and its text: failed when any rank failed or when they differ."""
    kinds = [outcome.outcome for outcome in outcomes]
    tests = {outcome.what for outcome in outcomes}
    if len(tests) > 1:
        return "failed", "the ranks run different tests:\n" + _listed([outcome.what for outcome in outcomes])
    if "failed" not in kinds and len(set(kinds)) == 1:
        return kinds[0], outcomes[0].text
    if "failed" not in kinds:
        return "failed", "the ranks disagree, so none may go on alone:\n" + _listed(
            [f"{outcome.outcome} {outcome.text}".rstrip() for outcome in outcomes]
        )
    failed = [rank for rank, kind in enumerate(kinds) if kind == "failed"]
    ranks_of_text: dict[str, list[int]] = {}
    for rank in failed:
        ranks_of_text.setdefault(outcomes[rank].text, []).append(rank)
    sections = [f"--- {_ranks(ranks)} ---\n{text.rstrip()}" for text, ranks in ranks_of_text.items()]
    return "failed", "\n".join([f"failed on {_ranks(failed)} of {len(outcomes)}", *sections])


def first_difference(lists: list[list[str]]) -> str | None:
    """Describe the first rank whose list of tests differs from rank 0's, or return None when all are equal."""
    for rank, tests in enumerate(lists):
        if tests != lists[0]:
            missing = [test for test in lists[0] if test not in tests]
            added = [test for test in tests if test not in lists[0]]
            return (
                f"the ranks collected different tests: rank 0 has {len(lists[0])}, rank {rank} has {len(tests)}; "
                f"rank {rank} lacks {missing[:3]} and alone has {added[:3]}"
            )
    return None


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _listed(texts: list[str]) -> str:
    return "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts))
