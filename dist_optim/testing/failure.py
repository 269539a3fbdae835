"""The report of a body that did not end well on every rank."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class RankFailure(AssertionError):
    """A body failed, died or did not end on some rank; the message is the whole report.

    Attributes:
        tracebacks: rank -> formatted traceback, in the order in which they arrived.
        exit_codes: rank -> exit code of a process that ended; negative for a signal, None when unknown.
        crashes: rank -> the Python stacks of its threads when a signal such as SIGSEGV ended it.
        still_running: rank -> its Python stack when it was stopped, for each rank that had not ended.
        native_stacks: rank -> its threads' native stacks, of a crash or a time-out, where gdb could read them.
    """

    def __init__(
        self,
        what: str,
        *,
        tracebacks: Mapping[int, str] | None = None,
        exit_codes: Mapping[int, int | None] | None = None,
        crashes: Mapping[int, str] | None = None,
        still_running: Mapping[int, str] | None = None,
        native_stacks: Mapping[int, str] | None = None,
    ) -> None:
        self.tracebacks = dict(tracebacks or {})
        self.exit_codes = dict(exit_codes or {})
        self.crashes = dict(crashes or {})
        self.still_running = dict(still_running or {})
        self.native_stacks = dict(native_stacks or {})
        super().__init__("\n".join([f"{what}: {self._summary()}", *self._sections()]))

    def _summary(self) -> str:
        parts: list[tuple[str, Iterable[int]]] = [
            ("died", self.exit_codes),
            ("raised", self.tracebacks),
            ("still waiting", self.still_running),
        ]
        return "; ".join(f"{_name_ranks(ranks)} {verb}" for verb, ranks in parts if ranks)

    def _sections(self) -> list[str]:
        # A rank that died comes first: the tracebacks of the others are then most often its consequence.
        died = [
            f"--- rank {rank} died: {describe_exit(code)} ---\n{self.crashes.get(rank, '').rstrip()}".rstrip()
            for rank, code in self.exit_codes.items()
        ]
        raised = [f"--- rank {rank} raised ---\n{text.rstrip()}" for rank, text in self.tracebacks.items()]
        waiting = [
            f"--- rank {rank} was still waiting ---\n{stack.rstrip()}" for rank, stack in self.still_running.items()
        ]
        native = [
            f"--- rank {rank}, native stacks ---\n{stacks.rstrip()}" for rank, stacks in self.native_stacks.items()
        ]
        return died + raised + waiting + native


def _name_ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in sorted(ranks)]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


def is_crash(code: int | None) -> bool:
    """Whether a signal that faulthandler reports ended the process: an error inside native code."""
    return code is not None and -code in CRASHES


def describe_exit(code: int | None) -> str:
    """Say in words how a process ended."""
    if code is None:
        return "its exit code is unknown"
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"
