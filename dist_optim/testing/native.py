"""Native stacks of ranks, read with gdb where it is installed: of living ones, and of dead ones from their core dumps.

A crash inside torch or gloo has no Python frame, and a rank that waits in a collective shows only where it called it.
Nothing here is needed for a report: without gdb, a core dump or the right to attach there is simply less to read.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["allow_tracing_by", "native_stacks"]

PATIENCE_S = 60.0  # for all ranks together: gdb reads the symbols of torch first, which takes seconds
NUM_FRAMES = 30
LINE_LENGTH = 200  # of C++ names that go on for thousands of characters
BACKTRACES = f"thread apply all -ascending backtrace {NUM_FRAMES}"
GDB = ("-nx", "-batch", "-iex", "set debuginfod enabled off", "-ex", BACKTRACES)
PR_SET_PTRACER = 0x59616D61
OUT_OF_TIME = f"# gdb did not end within {PATIENCE_S:g} s"


def allow_tracing_by(process_id: int) -> None:
    """Let that process and its children attach to this one, where the kernel allows it to ancestors alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(process_id), 0, 0, 0)


def native_stacks(living: Mapping[int, int], dead: Mapping[int, int]) -> dict[int, str]:
    """Read the stacks of all threads, within a minute for all ranks together.

    Args:
        living: rank -> process id of ranks that have not ended.
        dead: rank -> process id of ranks that crashed. Found where core dumps are on (``ulimit -c unlimited``) and
            the kernel writes them to a file.

    Returns:
        rank -> its stacks, of those that could be read; where time was up, what there is of them, and that it was.
    """
    gdb = shutil.which("gdb")
    if gdb is None:
        return {}
    targets = {rank: ["-p", str(process_id)] for rank, process_id in living.items()}
    for rank, process_id in dead.items():
        if (core := _core_of(process_id)) is not None:
            targets[rank] = [sys.executable, str(core)]
    deadline = time.monotonic() + PATIENCE_S
    with tempfile.TemporaryDirectory(prefix="rank-pool-gdb-") as directory:
        texts = _run_together({rank: [gdb, *GDB, *target] for rank, target in targets.items()}, directory, deadline)
    # One name may serve all core dumps: then the last one is there, whosever it is.
    texts = {
        rank: text
        for rank, text in texts.items()
        if rank in living or f"LWP {dead[rank]}" in text or OUT_OF_TIME in text
    }
    return {rank: stacks for rank, text in texts.items() if (stacks := _trimmed(text))}


def _run_together(commands: Mapping[int, list[str]], directory: str, deadline: float) -> dict[int, str]:
    """What each command printed until it ended or time was up."""
    outputs = {rank: Path(directory, str(rank)) for rank in commands}
    running = {}
    for rank, command in commands.items():
        with outputs[rank].open("w") as file:
            running[rank] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL)
    for rank, process in running.items():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            with outputs[rank].open("a") as file:
                file.write(f"\n{OUT_OF_TIME}\n")
    return {rank: output.read_text(errors="replace") for rank, output in outputs.items()}


def _core_of(process_id: int) -> Path | None:
    """The newest file that the kernel's pattern may have given this process's core dump; None where it is piped."""
    try:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
        adds_id = Path("/proc/sys/kernel/core_uses_pid").read_text().strip() != "0"
    except OSError:
        return None
    if pattern.startswith("|"):
        return None
    if adds_id and "%p" not in pattern:
        pattern += ".%p"
    folder, name = os.path.split(pattern.replace("%p", str(process_id)))
    candidates = [path for path in Path.cwd().joinpath(folder).glob(re.sub("%.", "*", name)) if path.is_file()]
    return max(candidates, key=lambda path: path.stat().st_mtime, default=None)


def _trimmed(text: str) -> str:
    return "\n".join(line[:LINE_LENGTH] for line in text.splitlines() if line.startswith(("Thread ", "#")))
