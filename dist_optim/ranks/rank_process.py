"""A rank as a process on a host: how it is named, and whether its system still has it."""

from __future__ import annotations

import enum
import os
import socket
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Condition", "RankProcess"]

PROC = Path("/proc")


class Condition(enum.Enum):
    """What a system says about a process."""

    RUNS = "is alive, but something keeps it from the interpreter or from the network"
    STOPPED = "is stopped, by SIGSTOP or a debugger of the whole process"
    ENDED = "has ended"
    UNKNOWN = "is on another machine, or in another container"


@dataclass(frozen=True, slots=True)
class RankProcess:
    """Where a rank runs. Two ranks with the same ``machine`` see each other's process ids."""

    rank: int
    host: str
    pid: int
    machine: str
    started: str

    @classmethod
    def own(cls, rank: int) -> RankProcess:
        """This process, as the given rank of the job."""
        _, started = _stat(os.getpid())
        return cls(rank, socket.gethostname(), os.getpid(), _machine(), started)

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def condition(self) -> Condition:
        """What this machine knows of the process; ``UNKNOWN`` when it runs on another."""
        if not self.machine or self.machine != _machine():
            return Condition.UNKNOWN
        state, started = _stat(self.pid)
        if state in ("", "Z", "X") or started != self.started:
            return Condition.ENDED
        return Condition.STOPPED if state in ("T", "t") else Condition.RUNS


def _machine() -> str:
    """A name of this boot of this machine and its space of process ids; empty where the system has no /proc."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip() + os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """The state letter of a process, and when it started, in clock ticks since boot; empty when there is none."""
    try:
        # The command's name is in parentheses, and may itself hold spaces and parentheses.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
