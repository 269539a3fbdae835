"""What is said before a step of the engine: inside one, DeepSpeed has moved its gradients, and cannot begin again."""

from __future__ import annotations

import functools
from typing import Any

from dist_optim.ranks.background import look_together

__all__ = ["tell_before_steps"]


def tell_before_steps(engine: Any) -> None:
    """Let this engine's ``step`` raise what an asynchronous save has failed with, before it does anything."""
    step, ranks = engine.step, engine.seq_data_parallel_group

    @functools.wraps(step)
    def step_unless_told(*args: Any, **options: Any) -> Any:
        look_together("engine.step()", ranks)
        return step(*args, **options)

    engine.step = step_unless_told
