"""How a rank of a script ends over a mistake of the user's: one line for the whole job, and exit code 2."""

from __future__ import annotations

import signal
import sys
import threading
from typing import NoReturn

from dist_optim.integrations.signals import is_rank_0

__all__ = ["REFUSED", "error_line", "refuse"]

REFUSED = 2
OTHERS_SPEAK_S = 5.0


def error_line(error: BaseException, where: str = "") -> str:
    """``error: WHERE: what happened``, in one line however long."""
    return f"error: {f'{where}: ' if where else ''}{' '.join(str(error).split())}"


def refuse(error: BaseException, where: str = "") -> NoReturn:
    """Say it and end this rank. Every rank that makes the mistake calls it; no collective, as others may not.

    Rank 0 says it. Another rank that hears within seconds that the launcher ends the job (rank 0 has left, for the same
    mistake most likely) says nothing more; one that hears nothing has made the mistake alone, and says it itself.
    """
    is_ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: is_ending.set())
    if is_rank_0() or not is_ending.wait(OTHERS_SPEAK_S):
        print(error_line(error, where), file=sys.stderr, flush=True)
    sys.exit(REFUSED)
