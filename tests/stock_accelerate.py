"""What loops with accelerate and a stock optimizer do where ours refuses: more of ``stock_loops``."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from accelerate.local_sgd import LocalSGD
from situations import is_last
from situations_accelerate import prepared
from stock_loops import average, note, train_as
from stock_sessions import StockEngine


def built_before(engine: StockEngine, name: str, folder: Path) -> None:
    """As accelerate's own examples have it."""
    alone = engine.alone(name)
    alone.train(range(3))
    with prepared(engine, name) as one:
        one.train(range(3))
        note("trained", one, alone)


def uneven(engine: StockEngine, name: str, folder: Path) -> None:
    """The last rank runs out of batches a step before the others."""
    alone = engine.alone(name)
    for step in range(2):
        average(alone, step, engine.num_ranks)
    average(alone, 2, engine.num_ranks, engine.num_ranks - 1)
    with prepared(engine, name, differs=True) as one:
        with one.accelerator.join_uneven_inputs([one.model], even_batches=False):
            one.train(range(2 if is_last() else 3))
        note("after the last batch", one, alone)


def saved_by_one(engine: StockEngine, name: str, folder: Path) -> None:
    alone = engine.alone(name)
    alone.train(range(4))
    with prepared(engine, name) as one:
        one.train(range(2))
        if dist.get_rank() == 0:
            one.accelerator.save_state(str(folder))
        one.train(range(2, 4))
        note("gone on", one, alone)


def local_sgd(engine: StockEngine, name: str, folder: Path) -> None:
    """Two steps of each rank's own, and the mean of all weights."""
    ranks = [engine.alone(name) for _ in range(engine.num_ranks)]
    for rank, alone in enumerate(ranks):
        for step in range(2):
            train_as(alone, rank, step)
    for parts in zip(*(alone.model.parameters() for alone in ranks), strict=True):
        parts[0].data.copy_(sum((part.detach() for part in parts[1:]), parts[0].detach()) / len(parts))
    with prepared(engine, name, differs=True) as one:
        with LocalSGD(one.accelerator, one.model, local_sgd_steps=2) as local:
            for step in range(2):
                one.train([step])
                local.step()
        note("after local steps", one, ranks[0])
