"""The values of a param group as JSON has them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_optim.checkpoint.blocks import Pieces

__all__ = ["decoded", "encoded"]


def encoded(value: Any, name: str, pieces: dict[str, Pieces]) -> Any:
    """A param group's value as JSON has it: tuples are marked, tensors go among the pieces, other objects stay out."""
    if isinstance(value, dict):
        kept = {key: encoded(item, f"{name}/{key}", pieces) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not NotImplemented}
    if isinstance(value, (list, tuple)):
        items = [encoded(item, f"{name}/{at}", pieces) for at, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Tensor):
        pieces[name] = Pieces.whole(value)
        return {"tensor": name}
    return value if value is None or isinstance(value, (bool, int, float, str)) else NotImplemented


def decoded(value: Any, pieces: Mapping[str, Pieces]) -> Any:
    """The inverse of ``encoded``, with the tensors that have been read into ``pieces``."""
    if isinstance(value, list):
        return [decoded(item, pieces) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(decoded(item, pieces) for item in value["tuple"])
    if value.keys() == {"tensor"}:
        (tensor,) = pieces[value["tensor"]].blocks.values()
        return tensor
    return {key: decoded(item, pieces) for key, item in value.items()}
