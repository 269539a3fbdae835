"""All of a file or none of it: what was there stays until what takes its place is whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["written_whole"]


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file beside it, to be written in the block: it takes the file's place if that ends without an error. Local.

    Raises:
        OSError: It cannot be written, or put in its place; nothing of it is left.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
