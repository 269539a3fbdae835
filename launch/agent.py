"""torchrun, as `torchrun` itself, whose agent ends when the rendezvous no longer answers; `multinode.sh` runs it.

torch's agent asks the rendezvous store between two looks at its workers, and some of these calls have no timeout. On a
host that is cut off it then waits until the kernel gives the connection up, which takes many minutes, and a signal does
not reach it there. Its workers end by themselves (`dist_optim.ranks.liveness`); so does this agent.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from torch.distributed.run import main

from dist_optim.errors import DistOptimError
from dist_optim.ranks.liveness import timeout_of

POLL_S = 1.0
# Where the main thread waits for the store, or for the thread that does. It sleeps between its calls elsewhere.
WAITS_IN = {"c10d_rendezvous_backend.py", "dynamic_rendezvous.py"}


def end_without_rendezvous(timeout_s: float, main_thread: int) -> None:
    """End this process once its main thread has been in one call of the rendezvous for ``timeout_s`` seconds."""
    seen: tuple[FrameType, int] | None = None
    since = time.monotonic()
    while True:
        frame = sys._current_frames().get(main_thread)
        if frame is None:
            return
        now = (frame, frame.f_lasti)
        if now != seen or Path(frame.f_code.co_filename).name not in WAITS_IN:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since >= timeout_s:
            break
        del frame, now
        time.sleep(POLL_S)
    print(
        f"launch/agent.py: the rendezvous has not been heard from for {timeout_s:g} s by host {socket.gethostname()}: "
        "the host in RDZV_ENDPOINT, or the network to it, is down. This host's agent ends.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


if __name__ == "__main__":
    try:
        timeout_s = timeout_of()
    except DistOptimError as error:
        sys.exit(f"error: {error}")
    if timeout_s > 0:
        arguments = (timeout_s, threading.get_ident())
        threading.Thread(target=end_without_rendezvous, args=arguments, name="rendezvous-watch", daemon=True).start()
    main()
