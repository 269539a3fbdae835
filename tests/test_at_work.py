"""Long work says on rank 0's terminal what it is; short work and other ranks say nothing, nor is a file written to."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from patience import PATIENCE_S

PROGRAM = """
import sys, time
from dist_optim.ranks import at_work
at_work.DELAY_S, at_work.POLL_S = {delay}, 0.05
with at_work.at_work("the outer work"):
    with at_work.at_work("the inner work"):
        time.sleep(0.5)
    time.sleep(0.5)
time.sleep(0.3)
print("at its end", file=sys.stderr)
"""
OF_A_SAVE = """
import torch, dist_optim, time
from dist_optim.checkpoint import blocks
from dist_optim.ranks import at_work
at_work.DELAY_S, at_work.POLL_S = 0.1, 0.02
save = blocks.dcp.save
blocks.dcp.save = lambda *args, **options: (time.sleep(0.4), save(*args, **options))
model = torch.nn.Linear(4, 4)
optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, print_audit=False)
dist_optim.save_checkpoint(FOLDER, model, optimizer)
"""


def said_on_a_terminal(program: str) -> str:
    """Its standard error, where that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=theirs)
    os.close(theirs)
    found = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # its other end is closed
            break
        if not read:
            break
        found += read
    os.close(ours)
    assert process.wait(PATIENCE_S) == 0, found.decode()
    return found.decode()


def test_what_takes_long_is_named_innermost_first() -> None:
    said = said_on_a_terminal(PROGRAM.format(delay=0.1))
    assert said.index("the inner work: 00:0") < said.index("the outer work: 00:0")
    assert said.rpartition("\r")[2].strip() == "at its end" or said.endswith("at its end\r\n")


def test_what_is_soon_done_is_not() -> None:
    assert said_on_a_terminal(PROGRAM.format(delay=5)) == "at its end\r\n"


WITHOUT_TQDM = """
import sys, threading
sys.modules["tqdm"] = None
started, start = [], threading.Thread.start
threading.Thread.start = lambda self: (started.append(self.name), start(self))
"""


def test_without_tqdm_no_thread_is_started_again_and_again() -> None:
    said = said_on_a_terminal(WITHOUT_TQDM + PROGRAM.format(delay=0.1) + "print(started, file=sys.stderr)")
    assert said == "at its end\r\n[]\r\n"


def test_where_nobody_watches_nothing_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(delay=0.1)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "at its end\n")


def test_a_save_that_takes_long_names_its_folder(tmp_path: object) -> None:
    said = said_on_a_terminal(OF_A_SAVE.replace("FOLDER", repr(f"{tmp_path}/run")))
    assert "Writing" in said and "run" in said
