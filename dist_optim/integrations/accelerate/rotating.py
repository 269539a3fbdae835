"""accelerate's ``total_limit``: older states are removed when the new one is whole.

accelerate 1.15 removes them before it writes: a job that is killed meanwhile may be left with none.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["nothing_removed", "remove_older"]

NUMBERED = re.compile(r"checkpoint_(\d+)")


@contextmanager
def nothing_removed(accelerator: Accelerator) -> Iterator[int | None]:
    """Inside, accelerate keeps every state; given is how many are to be left afterwards, where there is a limit."""
    project = accelerator.project_configuration
    limit, project.total_limit = project.total_limit, None
    try:
        yield limit if project.automatic_checkpoint_naming else None
    finally:
        project.total_limit = limit


def remove_older(folder: Path, limit: int | None) -> None:
    """Of the states that accelerate has numbered beside this one, leave the last ones."""
    if limit is None:
        return
    found = {int(match[1]): path for path in folder.parent.iterdir() if (match := NUMBERED.fullmatch(path.name))}
    for number in sorted(found)[: max(0, len(found) - limit)]:
        if found[number] != folder:
            shutil.rmtree(found[number])
