"""The parts: each a module here with ``items(settings)``, run in a process of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from measuring.on_gpu.rows import Items, Log, Settings, outcome, run_items

__all__ = ["PARTS", "Part", "run_here"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a part is called on the page, and how long it may take."""

    title: str
    seconds: float
    item_seconds: float = 60.0
    """After which an item is ended, so that others have their turn."""
    is_slow_a_failure: bool = True
    """What takes longer hangs; where it may as well be slow, it is skipped."""
    is_timed: bool = True
    """It has the GPU to itself; others run beside each other."""


PARTS = {
    "own_tests": Part(title="Tests", seconds=250, is_timed=False),
    "equal_bits": Part(title="Equal to upstream on the GPU", seconds=250, is_timed=False),
    "llama_steps": Part(title="A step of a Llama of 1.1 billion parameters", seconds=230, is_slow_a_failure=False),
    "decompositions": Part(title="Singular value decompositions", seconds=40, item_seconds=40, is_slow_a_failure=False),
    "packed_copies": Part(title="Packed copies", seconds=30),
    "doors": Part(title="The training script under each launcher", seconds=250, item_seconds=130, is_timed=False),
    "host_waits": Part(title="Waits for the GPU in a steady step", seconds=120, is_timed=False),
}
"""By module. Together they take less than ten minutes, whatever happens."""


def run_here(part: str, settings: Settings, log: Log) -> None:
    """Run it in this process; a part that cannot even begin is one row that says why."""
    try:
        items_of: Callable[[Settings], Items] = importlib.import_module(f"measuring.on_gpu.{part}").items
        items = items_of(settings)
    except Exception as error:
        log.tell(names=[part])
        log.tell(row={"name": part, **outcome(error), "seconds": 0.0})
        return
    run_items(items, log)
