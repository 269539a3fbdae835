"""What a stock optimizer does in each situation of docs/situations.md: the same loops, and what comes of them.

A body runs on every rank as a user's script would: nothing is caught, and nothing is exchanged but by stock. Most rows
have the body that ours has; where that expects a refusal, the loop here goes on as a user's would. ``stock_cell``
measures on each rank how far its weights are from those of one process with the same stock optimizer.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import failing_backward
import situations
import situations_loops
import stock_accelerate
import stock_loops
from every_situation import EVERY_ROW
from situations import ALONE, Situation, without_paths
from stock_loops import FOUND, Ended
from stock_sessions import STOCK, StockEngine

Body = Callable[[StockEngine, str, Path], object]


class Stopped(Exception):
    """What was raised on this rank, in one line."""


BODIES: dict[str, Body] = {
    "a learning rate differs on one rank": stock_loops.rate_differs,
    "a gradient is missing on one rank": stock_loops.gradient_missing,
    "one rank fails in the step": stock_loops.step_fails,
    "upstream fails on a NaN gradient, and the run is saved": stock_loops.upstream_fails_on_nan,
    "an infinite gradient on one rank, raised": stock_loops.nonfinite,
    "loss scaling, an overflow on one rank": stock_loops.scaled,
    "loss scaling by ShardedGradScaler": partial(stock_loops.scaled, is_sharded=True),
    "a step inside torch's Join": stock_loops.joined,
    "frozen at building, in a group, unfrozen later": stock_loops.unfrozen_later,
    "frozen at building, in no group, unfrozen later": partial(stock_loops.unfrozen_later, is_listed=False),
    "frozen when DDP wrapped the model, unfrozen later": stock_loops.wrapped_frozen,
    "one rank fails in a save": stock_loops.save_fails,
    "one rank fails in a load": stock_loops.load_fails,
    "resumed on several ranks without the engine": stock_loops.resumed_without_the_wrapper,
    "gradients not reduced in a later step": stock_loops.unreduced_later,
    "a rank changes its reduced gradients": stock_loops.gradients_differ,
    "saved by one rank": partial(stock_loops.alone_at, call=stock_loops.write),
    "evaluated by one rank": partial(stock_loops.alone_at, call=stock_loops.evaluate),
    "state read by one rank": partial(stock_loops.alone_at, call=stock_loops.read_for_torch),
    "state_dict() by one rank": partial(stock_loops.alone_at, call=stock_loops.read_state),
    "add_param_group between steps, GaLore": situations_loops.group_added,
    "the optimizer is copied (deepcopy)": stock_loops.deep_copied,
    "gradients clipped by one rank": stock_loops.clipped_by_one,
    "local SGD by DDP's hook": stock_loops.local_steps_averaged,
    "saved in one rank's except": partial(stock_loops.alone_at, call=stock_loops.write_in_except),
    "a sparse embedding": stock_loops.sparse,
    "a gradient of another dtype than its parameter's": stock_loops.gradient_of_another_type,
    "an argument of the build differs on one rank": stock_loops.argument_differs,
    "accelerate: an optimizer that is built already": stock_accelerate.built_before,
    "accelerate: uneven inputs (join_uneven_inputs)": stock_accelerate.uneven,
    "accelerate: save_state by one rank": stock_accelerate.saved_by_one,
    "accelerate: LocalSGD": stock_accelerate.local_sgd,
    failing_backward.TITLE: stock_loops.backward_fails,
}
"""By the row's title; all other rows have the body that ours has."""
OWN_OPTION = "stock has no such option: the row above"
FILES = "DeepSpeed's files load through its engine alone"
NOT_FOR_STOCK: dict[str, dict[str, str]] = {
    "an infinite gradient on one rank, skipped": {engine.title: OWN_OPTION for engine in STOCK},
    "resumed by one process": {engine.title: FILES for engine in STOCK if engine.is_zero},
    failing_backward.TITLE: ALONE,
}
"""By the row's title and the engine's, why there is nothing to try, where ours has a cell."""
BY_TITLE: dict[str, Situation] = {situation.title: situation for situation in EVERY_ROW}


def name_of(title: str) -> str:
    """Of the optimizer: the first one that ours is measured with."""
    return BY_TITLE[title].optimizers[0] if title in BY_TITLE else "adamw_torch"


def stock_cell(title: str, engine: StockEngine, folder: Path) -> Ended:
    """The body of a cell, on every rank: what it ends with. The folder is not there yet.

    Raises:
        Stopped: The loop raised on this rank.
    """
    body = BODIES.get(title) or BY_TITLE[title].body
    FOUND.clear()
    with measured(), contextlib.redirect_stdout(io.StringIO()):
        try:
            body(engine, name_of(title), folder)
        except BaseException as error:  # as torch's CheckpointException is
            raise Stopped(in_one_line(error)) from error
    return max(FOUND, key=lambda ended: math.inf if math.isnan(ended.distance) else ended.distance)


def in_one_line(error: BaseException) -> str:
    """Its kind and first line; and the last one, where torch puts the error that it began with."""
    plain = re.sub(r"\x1b\[\d*m", "", str(error))  # without colours
    lines = [line.strip() for line in plain.splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0]}" + (f" ... {lines[-1]}" if len(lines) > 1 else "")
    return without_paths(text)


@contextmanager
def measured() -> Iterator[None]:
    """Bodies that compare measure instead."""
    with mock.patch.object(situations, "compare", stock_loops.note):
        yield
