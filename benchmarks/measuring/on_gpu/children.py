"""Each part in a process of its own: what crashes, hangs or takes too long ends itself, and the rest goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from measuring.on_gpu.parts import Part
from measuring.on_gpu.rows import Log, Row, read_log

__all__ = ["rows_of"]

POLL_S = 0.2
GRACE_S = 5.0
"""From asking a process to end to ending it."""


def rows_of(part: Part, command: Sequence[str]) -> list[Row]:
    """Run a part until all its items have a row, in as many processes as it takes, within its time.

    Args:
        part: Its limits.
        command: Runs it, given the path of its log, and goes on where the log ends.
    """
    deadline = time.monotonic() + part.seconds
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        log = Log(Path(folder) / "log")
        is_over = False
        while not is_over:
            num_rows = len(read_log(log.path).rows)
            status, why = one_process([*command, str(log.path)], log, part, deadline)
            told = read_log(log.path)
            if told.begun is not None:
                log.tell(row={"name": told.begun, "status": status, "reason": why, "seconds": 0.0})
            is_over = time.monotonic() >= deadline or len(read_log(log.path).rows) == num_rows
            is_over = is_over or set(told.names) <= set(read_log(log.path).rows)
        told = read_log(log.path)
    missing = "no time was left" if time.monotonic() >= deadline else f"the part did not go on: {why}"
    rest = [{"name": name, "status": "skipped", "reason": missing, "seconds": 0.0} for name in told.names or ["all"]]
    return [*told.rows.values(), *(row for row in rest if row["name"] not in told.rows)]


def one_process(command: Sequence[str], log: Log, part: Part, deadline: float) -> tuple[str, str]:
    """Run it to its end, or end it where its time is over, or one item's; what became of that item, and why."""
    process = subprocess.Popen([sys.executable, *command], start_new_session=True)
    try:
        item, since = None, time.monotonic()
        while process.poll() is None:
            now, begun = time.monotonic(), read_log(log.path).begun
            if begun != item:
                item, since = begun, now
            if now >= deadline:
                return "skipped", "it still ran when the time of its part was over"
            if item is not None and now - since > part.item_seconds:
                return (
                    "failed" if part.is_slow_a_failure else "skipped",
                    f"it still ran after {part.item_seconds:.0f} s",
                )
            time.sleep(POLL_S)
        return "failed", ended(process.returncode)
    finally:
        end(process)


def ended(code: int) -> str:
    names = {one.value: one.name for one in signal.Signals}
    return f"its process ended with {names.get(-code, f'exit code {code}')}"


def end(process: subprocess.Popen[bytes]) -> None:
    """It, and what it has started in its session."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
