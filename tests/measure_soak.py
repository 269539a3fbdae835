"""``make soak``: the long run of ``tests/soak.py`` under each engine, against one process; writes docs/soak.json.

A run that ends on other bits, or in which a failure does not end as it should, fails the command; nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

from rich.progress import track
from sessions import ENGINES
from soak import Script, script, soak

from dist_optim.testing import RankPool

RESULTS = Path(__file__).parent.parent / "docs" / "soak.json"
NUM_STEPS, NUM_RANKS, SEED = 2000, 2, 0
TIMEOUT_S = 1200.0
"""A run; it takes a minute or two on two cores."""
RUNS = {"DDP": "schedule_free_adamw", "FSDP2": "galore_adamw", "ZeRO-2": "schedule_free_adamw"}
"""By engine, the optimizer."""


def digest(drawn: Script) -> int:
    """Of everything that happens: it differs where the recorded runs were others than would be measured now."""
    return zlib.crc32(repr([drawn, *(round(drawn.rate(step), 9) for step in range(drawn.num_steps))]).encode())


def expected() -> dict[str, Any]:
    """What the file says whatever is measured."""
    drawn = script(SEED, NUM_STEPS, NUM_RANKS)
    return {"seed": SEED, "ranks": NUM_RANKS, "script": digest(drawn), **drawn.counts()}


def main() -> int:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    pool = RankPool(NUM_RANKS, timeout_s=TIMEOUT_S)
    chosen = sys.argv[1:] or RUNS  # titles measure these engines alone, and keep the others
    cells = [engine for engine in ENGINES if engine.title in chosen]
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs: dict[str, dict[str, Any]] = held.get("runs", {}) if held.get("script") == expected()["script"] else {}
    for engine in track(cells, description="soak"):
        name = RUNS[engine.title]
        runs[engine.title] = {"optimizer": name, **pool.run(soak, engine, name, SEED, NUM_STEPS)[0]}
    pool.close()
    RESULTS.write_text(
        json.dumps({**expected(), "runs": {title: runs[title] for title in RUNS if title in runs}}, indent=1) + "\n"
    )
    print(f"written: {RESULTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
