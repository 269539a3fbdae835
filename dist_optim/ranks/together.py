"""The one way to fail: what one rank fails at, all ranks raise, so that none goes on into a collective alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dist_optim.errors import DistOptimError, RankFailedError
from dist_optim.ranks.agreement import gather_objects

__all__ = ["raise_together", "together"]

Result = TypeVar("Result")


def together(
    action: Callable[[], Result],
    process_group: dist.ProcessGroup | None = None,
    *,
    doing: str = "",
    remedy: str = "",
    otherwise: type[DistOptimError] = RankFailedError,
) -> Result:
    """Run ``action`` on this rank, and raise on every rank when it failed on any. Collective.

    ``action`` itself calls no collective that another rank might miss.

    Args:
        action: What may fail, by any exception.
        process_group: The ranks that do this together; the default group when None.
        doing: What is being done, for the message: "Writing 'folder'".
        remedy: What to do about an exception that is not ours, which does not say so itself.
        otherwise: The class that stands for an exception that is not ours; it is raised from the original.

    Returns:
        What ``action`` returned here.

    Raises:
        DistOptimError: On every rank. A rank that failed raises its own error, the others the first one's, with the
            rank that it came from.
    """
    error: DistOptimError | None = None
    try:
        result = action()
    except DistOptimError as caught:
        error = caught
    except Exception as caught:
        # In pieces, since its own text may be long, empty, or of many lines.
        what = f"{doing or 'An action of all ranks'} failed with {type(caught).__name__}: {_first_line(caught)}"
        error = otherwise(f"{what}. {remedy}".rstrip())
        error.__cause__ = caught
    raise_together(error, process_group)
    return result


def raise_together(error: DistOptimError | None, process_group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank when any rank has an error. Collective.

    The rank that has an error raises its own; the others raise the first one, with the rank it came from.
    """
    messages = gather_objects(None if error is None else (type(error), str(error)), process_group)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            error_type, text = message
            raise error_type(f"[from rank {rank}] {text}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no text"
