"""What grows with the number of ranks: rank 0 and the busiest rank of 8 to 1,024, one after the other on this machine.

python benchmarks/scale.py                            # the table of docs/performance.md
python benchmarks/scale.py --world-size 512 --rank 0  # one rank's figures, as JSON
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from measuring.scale import Figures, measure_rank
from measuring.tables import scale_table

__all__ = ["figures_of", "rows"]

WORLD_SIZES = (8, 64, 512, 1024)
NUM_TENSORS = 720


def figures_of(
    world_size: int, rank: int = 0, optimizer: str = "stable_adamw", num_tensors: int = NUM_TENSORS
) -> Figures:
    """What one rank of so many finds, in a process of its own.

    Raises:
        RuntimeError: It failed; with what it wrote.
    """
    asked = {"world-size": world_size, "rank": rank, "optimizer": optimizer, "tensors": num_tensors}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in asked.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def rows(optimizer: str = "stable_adamw", num_tensors: int = NUM_TENSORS) -> list[Figures]:
    """Rank 0 of each number of ranks, and the busiest where that is another."""
    found = []
    for world_size in WORLD_SIZES:
        found.append(figures_of(world_size, 0, optimizer, num_tensors))
        if busiest := found[-1]["busiest_rank"]:
            found.append(figures_of(world_size, busiest, optimizer, num_tensors))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--optimizer", default="stable_adamw")
    parser.add_argument("--tensors", type=int, default=NUM_TENSORS)
    asked = parser.parse_args()
    if asked.world_size:
        print(json.dumps(measure_rank(asked.world_size, asked.rank, asked.optimizer, asked.tensors)))
    else:
        print(scale_table(rows(asked.optimizer, asked.tensors)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
