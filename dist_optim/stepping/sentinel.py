"""The sentinel: every so many steps, ranks compare fingerprints of what they should hold alike.

It catches what no single step can: a weight changed on one rank, a rate that drifted, a replica's state gone astray.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dist_optim.ranks.agreement import assert_equal_where_named, described
from dist_optim.ranks.fingerprints import fingerprint
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.presence import hyperparameters_of

__all__ = ["compare_ranks"]


def compare_ranks(holdings: Holdings, progress: Progress) -> None:
    """Compare param groups, parameters and optimizer state between all ranks that hold the same of them. Collective.

    Raises:
        RanksDisagreeError: On all ranks, naming the first thing that differs, the step, and the ranks.
    """
    assert_equal_where_named(
        f"After step {progress.num_steps},",
        _marks(holdings),
        "Something changed it on one rank only (code that runs on one rank, a local metric, faulty memory). Resume "
        "from a checkpoint, and look for what treats ranks differently.",
        holdings.all_ranks,
    )


def _marks(held: Holdings) -> dict[str, Any]:
    """Name to value or fingerprint; a name says which part it is of, so that only equal parts are compared."""
    keys = {key for group in held.groups for key in group} - {"params"}
    marks: dict[str, Any] = {name: described(value) for name, value in hyperparameters_of(held.groups, keys)}
    for placed in held.placed:
        where = "" if placed.layout.is_replicated else f", slice {placed.layout.holders(held.rank)[0]}"
        marks[f"parameter {placed.fqn!r}{where} (fingerprint)"] = fingerprint(placed.local())
    for instance, index in held.stepped_here():
        layout = held.placed[index].layout
        is_whole = index in held.plan.owners or layout.is_replicated
        where = "" if is_whole else f", slice {layout.holders(held.rank)[0]}"
        for key, value in instance.encoded_state(index).items():
            shown = fingerprint(value) if isinstance(value, Tensor) else value
            marks[f"state {key!r} of {held.placed[index].fqn!r}{where}"] = shown
    return marks
